"""Devices along several axes are numbered alike everywhere."""

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from fast_attention.mesh.layout import move_along


@pytest.mark.eight_devices
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("axis", ["a", ("a", "b"), ("b", "a"), ("c", "a", "b")])
def test_what_moves_along_axes_in_any_order(axis):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

    def from_before():
        count = lax.axis_size(axis)
        pairs = [(i, i + 1) for i in range(count - 1)]
        return move_along(1 + lax.axis_index(axis), axis, pairs)[None]

    mapped = jax.shard_map(from_before, mesh=mesh, in_specs=(), out_specs=PartitionSpec(axis))
    found = np.asarray(jax.jit(mapped)())
    np.testing.assert_array_equal(found, np.arange(len(found)))
