"""Local attention across eight devices is that of one: windows go over the edges of stretches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.mechanisms.local.op import local_attention
from fast_attention.mechanisms.local.sharded import sharded_local_attention
from tests.compiling import compiled

B, T, H, K, D, V = 2, 21, 4, 2, 8, 6
RNG = np.random.default_rng(0)
SEGMENTS = np.asarray([[0] * 2 + [1] * 2 + [0] * 11 + [3] * 6, [5] * 18 + [1] * 3])
MASK = RNG.uniform(size=(B, T)) < 0.8


def arrays(heads=(H, K, K), widths=(D, D, V)):
    shapes = [(B, T, n, m) for n, m in zip(heads, widths, strict=True)]
    return [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.eight_devices
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("options", "distances"),
    [
        # The window goes beyond the neighbouring devices, whose stretches are of 3 positions.
        ({"window_size": 4, "causal": True, "segment_ids": SEGMENTS}, 8),
        ({"window_size": 1, "look_backward": 5, "exact_window": True, "key_mask": MASK}, 7),
        ({"window_size": 50, "key_mask": MASK}, 199),
    ],
    ids=["causal", "exact", "everything"],
)
def test_windows_go_across_edges(options, distances):
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    operands = (*arrays(), jnp.asarray(RNG.normal(size=(H, distances)), jnp.float32))
    weights = jnp.asarray(RNG.normal(size=(B, T, H, V)), jnp.float32)

    def outputs(attend):
        def loss(q, k, v, bias):
            out = attend(q, k, v, distance_bias=bias, **options)
            return jnp.sum(out * weights), out

        return compiled(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*operands)

    across = functools.partial(sharded_local_attention, mesh=mesh, axis="seq")
    grads, out = outputs(across)
    expected_grads, expected = outputs(local_attention)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-4)
