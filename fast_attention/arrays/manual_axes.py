"""Arrays inside ``jax.shard_map``: over which axes of the mesh they differ from device to device.

There a loop must carry arrays that differ over the same axes from its first round to its last, and
the gradient of what all devices share is a sum over them; JAX does both where it is given the axes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def vary_alike(tree: Tree, *others: Any) -> Tree:
    """Lets all arrays of ``tree`` differ over every axis over which one of these does.

    Outside ``jax.shard_map`` nothing happens.

    Args:
      tree: arrays.
      others: more arrays, to be considered only.
    """
    axes = frozenset[Any]().union(*(_varying(x) for x in jax.tree.leaves((tree, others))))

    def vary(x: Any) -> Any:
        missing = axes - _varying(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, tree)


def like_manual(shapes: list[jax.ShapeDtypeStruct], x: Any) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes of arrays that differ over the same axes as ``x``, for ``pl.pallas_call``."""
    axes = jax.typeof(x).manual_axis_type
    return [jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=axes) for s in shapes]


def _varying(x: Any) -> frozenset[Any]:
    return jax.typeof(x).manual_axis_type.varying
