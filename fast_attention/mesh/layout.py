"""Layouts of ``[*B, length, heads, width]`` arrays with the length sharded along a mesh axis.

Shape letters: B batch, T length, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fast_attention.arrays.types import Array

AxisName = str | tuple[str, ...]
"""Name of a mesh axis, or a tuple of names, as JAX's collectives take them."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes along which the axes of ``[*B, T, H, D]`` are sharded.

    Attributes:
      mesh: the devices.
      axis: the mesh axis of the length.
      batch: the mesh axis of each batch axis, None for none.
      heads: the mesh axis of the heads, None for none.
    """

    mesh: Mesh
    axis: AxisName
    batch: tuple[Any, ...]
    heads: Any

    @property
    def shards(self) -> int:
        """Number of shards of a sequence."""
        names = (self.axis,) if isinstance(self.axis, str) else self.axis
        return math.prod(self.mesh.shape[name] for name in names)

    def spec(self, *, length: bool = True, heads: bool = False, width: bool = False):
        """Spec of an array with the batch axes and the requested axes."""
        middle = ((self.axis,) if length else ()) + ((self.heads,) if heads else ())
        return PartitionSpec(*self.batch, *middle, *((None,) if width else ()))

    def fill(self, x: Array, *, edge: bool = False) -> Array:
        """Pads ``[*B, T, ...]`` to a multiple of `shards`, with zeros or the last entry."""
        place = len(self.batch)
        missing = -x.shape[place] % self.shards
        if not missing:
            return x
        widths = [(0, 0)] * x.ndim
        widths[place] = (0, missing)
        return jnp.pad(x, widths, mode="edge" if edge else "constant")


def own_dropout_key(key: Array | None, axis: AxisName | None) -> Array | None:
    """Gives every device of ``axis`` its own dropout key, inside ``jax.shard_map``."""
    if key is None or axis is None:
        return key
    return jax.random.fold_in(key, jax.lax.axis_index(axis))


def move_along(x: Array, axis: AxisName, pairs: Sequence[tuple[int, int]]) -> Array:
    """Sends an array from device to device along ``axis``, inside ``jax.shard_map``.

    This is ``jax.lax.ppermute``, which numbers the devices of several axes in the order of the
    mesh; here, as in ``jax.lax.axis_index``, they are numbered in the order of ``axis``.

    Args:
      x: what a device sends.
      axis: a mesh axis, or a tuple of axes in any order.
      pairs: numbers of sender and receiver.

    Returns:
      What this device receives, zeros if nothing.
    """
    mesh_order = jax.sharding.get_abstract_mesh().axis_names
    if isinstance(axis, str) or not set(axis) <= set(mesh_order):
        return jax.lax.ppermute(x, axis, pairs)
    ordered = sorted(axis, key=mesh_order.index)
    numbers = np.arange(math.prod(map(jax.lax.axis_size, axis)))
    numbers = numbers.reshape([jax.lax.axis_size(name) for name in ordered])
    numbers = numbers.transpose([ordered.index(name) for name in axis]).ravel()
    return jax.lax.ppermute(
        x, tuple(ordered), [(int(numbers[i]), int(numbers[j])) for i, j in pairs]
    )
