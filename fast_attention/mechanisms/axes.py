"""Attention over chosen axes: bring them together as one length axis, and back.

Shape letters: B batch (the axes not attended over), T length (the attended axes, flattened).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array
from fast_attention.mechanisms.checks import mismatch


def attended_axes(ndim: int, axis: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Checks the axes of a ``[..., heads, width]`` array to attend over.

    Args:
      ndim: number of axes of the query.
      axis: one axis or several; negative ones count from the end. None is the last before heads.

    Returns:
      Sorted nonnegative axes, or None if they are already in place.

    Raises:
      ValueError: for axes that are out of range, repeated, or those of heads and width.
    """
    if axis is None:
        return None
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in given):
        raise mismatch("axis", "a whole number or a tuple of them", repr(axis))
    axes = tuple(sorted(int(a) + ndim if a < 0 else int(a) for a in given))
    if not axes or len(set(axes)) != len(axes) or axes[0] < 0 or axes[-1] > ndim - 3:
        raise ValueError(
            f"axis must name different axes before heads and width, between 0 and {ndim - 3} for "
            f"arrays of {ndim} axes, got {axis!r}."
        )
    return None if axes == (ndim - 3,) else axes


def fold_axes(x: Array, axes: tuple[int, ...] | None, *, trailing: int) -> Array:
    """Flattens ``axes`` in row-major order into one axis before the last ``trailing`` ones."""
    if axes is None:
        return x
    leading = x.ndim - trailing
    batch = tuple(a for a in range(leading) if a not in axes)
    moved = jnp.transpose(x, (*batch, *axes, *range(leading, x.ndim)))
    length = math.prod(x.shape[a] for a in axes)
    return moved.reshape(*(x.shape[a] for a in batch), length, *x.shape[leading:])


def unfold_axes(x: Array, axes: tuple[int, ...] | None, shape: tuple[int, ...]) -> Array:
    """Inverse of :func:`fold_axes` with two trailing axes, for an original of ``shape``."""
    if axes is None:
        return x
    leading = len(shape) - 2
    batch = tuple(a for a in range(leading) if a not in axes)
    order = (*batch, *axes)
    x = x.reshape(*(shape[a] for a in order), *x.shape[-2:])
    back = sorted(range(leading), key=lambda position: order[position])
    return jnp.transpose(x, (*back, leading, leading + 1))
