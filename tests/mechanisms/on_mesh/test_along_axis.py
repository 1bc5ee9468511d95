"""Attention functions inside ``jax.shard_map``, the sequence along an axis of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fast_attention import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
    make_local_attention,
    make_lsh_attention,
)
from fast_attention.mechanisms.wrapped import as_attention_fn
from tests.compiling import compiled


@pytest.mark.eight_devices
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("implementation", [None, "pallas_tpu_interpret"])
def test_functions_attend_across_devices(implementation):
    linear = {"unidirectional": True, "implementation": implementation}
    functions = (
        make_fast_generalized_attention(kernel_fn="elu+1", **linear),
        make_fast_softmax_attention(nb_features=4, **linear)
        if implementation
        else make_local_attention(3, unidirectional=True),
    )
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.normal(size=(2, 16, 2, 4)), jnp.float32) for _ in range(3)]
    seen = jnp.asarray(rng.uniform(size=(2, 16)) < 0.8)
    rows = PartitionSpec(None, "seq")

    def across(q, k, v, seen):
        return [f.along_axis("seq")(q, k, v, key_mask=seen) for f in functions]

    mapped = jax.shard_map(
        across,
        mesh=mesh,
        in_specs=(rows,) * 4,
        out_specs=rows,
        check_vma=implementation is None,  # Which JAX's interpreter of kernels does not pass.
    )
    for out, function in zip(compiled(mapped)(*x, seen), functions, strict=True):
        np.testing.assert_allclose(out, function(*x, key_mask=seen), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (make_lsh_attention(8), "make_fast_softmax_attention"),
        (make_fast_softmax_attention(4, exact_window=2), "make_local_attention"),
        (make_fast_softmax_attention(4, estimator="wderf_s"), "calibrate it"),
        (jax.nn.dot_product_attention, "make_local_attention"),
    ],
)
def test_what_needs_all_positions_says_so(function, remedy):
    with pytest.raises(ValueError, match=remedy):
        as_attention_fn(function).along_axis("seq")


def test_local_attention_across_devices_has_no_bias():
    function = make_local_attention(2).along_axis("seq")
    x = jnp.ones((1, 4, 1, 2))
    with pytest.raises(ValueError, match="bias"):
        function(x, x, x, bias=jnp.zeros((1, 1, 4, 4)))
