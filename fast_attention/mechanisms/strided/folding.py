"""Attention among positions a stride apart, by folding the length ("axial" attention).

Position t belongs to class ``t mod W`` and sees its own class alone: the length becomes a
``[T / W, W]`` grid, whose columns attend by themselves, in order, through any ``attention_fn``.

Shape letters: B batch, T length, W stride, N rows of the grid, H heads, K key/value heads, D head
width, V value width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Int


def run_numbers(segment_ids: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """Numbers the runs of equal ids from 0: ids that come again are other numbers."""
    new_run = segment_ids[..., 1:] != segment_ids[..., :-1]
    runs = jnp.cumsum(new_run, axis=-1)
    return jnp.concatenate([jnp.zeros_like(runs, shape=(*runs.shape[:-1], 1)), runs], -1)


def fold(x: Array, stride: int, *, trailing: int) -> Array:
    """Turns ``[*B, T, ...]`` into ``[*B, W, N, ...]`` with zeros after the end.

    Args:
      x: an array with ``trailing`` axes after the length.
      stride: W.
      trailing: their number.
    """
    axis = x.ndim - trailing - 1
    length = x.shape[axis]
    rows = -(-length // stride)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, rows * stride - length)
    grid = jnp.pad(x, widths).reshape(*x.shape[:axis], rows, stride, *x.shape[axis + 1 :])
    return jnp.swapaxes(grid, axis, axis + 1)


def unfold(x: Array, length: int, *, trailing: int) -> Array:
    """Inverse of :func:`fold`: ``[*B, W, N, ...]`` to ``[*B, T, ...]``."""
    axis = x.ndim - trailing - 2
    grid = jnp.swapaxes(x, axis, axis + 1)
    flat = grid.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(flat, 0, length, axis=axis)
