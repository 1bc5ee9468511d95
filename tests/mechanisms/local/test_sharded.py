"""Local attention across eight devices is that of one: windows go over the edges of stretches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fast_attention.mechanisms.local.op import local_attention
from fast_attention.mechanisms.local.sharded import local_attention_of_shard
from fast_attention.mechanisms.local.window import LocalWindow
from tests.compiling import compiled

B, T, H, K, D, V = 2, 21, 4, 2, 8, 6
RNG = np.random.default_rng(0)
SEGMENTS = np.asarray([[0] * 2 + [1] * 2 + [0] * 11 + [3] * 6, [5] * 18 + [1] * 3])
MASK = RNG.uniform(size=(B, T)) < 0.8


def arrays(heads=(H, K, K), widths=(D, D, V)):
    shapes = [(B, T, n, m) for n, m in zip(heads, widths, strict=True)]
    random = np.random.default_rng(1)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.eight_devices
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("window", "options"),
    [
        # The window goes beyond the neighbouring devices, whose stretches are of 3 positions.
        (LocalWindow(4, causal=True), {"segment_ids": SEGMENTS}),
        (LocalWindow(1, look_backward=5, exact_window=True), {"key_mask": MASK}),
        (LocalWindow(50), {"key_mask": MASK}),
    ],
    ids=["causal", "exact", "everything"],
)
def test_windows_go_across_edges(window, options):
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = jnp.asarray(RNG.normal(size=(B, T, H, V)), jnp.float32)
    names = ("query", "key", "value", *options)
    rows = PartitionSpec(None, "seq")

    def across(*operands):
        """The length is filled up; what is filled in is hidden, or a segment of its own."""
        padding = -T % 8
        given = dict(zip(names, operands, strict=True))
        arrays = {
            name: jnp.pad(
                x,
                [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2),
                constant_values=-1 if name == "segment_ids" else 0,
            )
            for name, x in given.items()
        }

        def of_shard(arrays):
            return local_attention_of_shard(**arrays, window=window, axis_name="seq")

        return jax.shard_map(of_shard, mesh=mesh, in_specs=rows, out_specs=rows)(arrays)[:, :T]

    def outputs(attend):
        def loss(q, k, v):
            out = attend(q, k, v)
            return jnp.sum(out * weights), out

        return compiled(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays())

    others = [jnp.asarray(x) for x in options.values()]
    grads, out = outputs(lambda *operands: across(*operands, *others))
    expected_grads, expected = outputs(
        lambda *operands: local_attention(*operands, window, **options)
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-4)
