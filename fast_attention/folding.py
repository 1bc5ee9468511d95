"""Attention among positions a stride apart, by folding the length ("axial" attention).

Position t belongs to class ``t mod W`` and sees its own class alone: the length becomes a
``[T / W, W]`` grid, whose columns attend by themselves, in order, through any ``attention_fn``.

Shape letters: B batch, T length, W stride, N rows of the grid, H heads, K key/value heads, D head
width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.call_arguments import check_heads


def strided_attention(
    attention: Callable[..., Array],
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    *,
    stride: int,
    key_mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    **options: Any,
) -> Float[Array, "*B T H V"]:
    """Attends among positions that are congruent modulo ``stride``, for any length.

    Args:
      attention: an ``attention_fn``; its own causality holds, since folding keeps the order.
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      stride: W.
      key_mask: ``[*B, T]``; keys where it is False are not seen.
      segment_ids: ``[*B, T]``; positions see their own run of equal ids.
      **options: handed to ``attention``.

    Returns:
      ``[*B, T, H, V]``.

    Raises:
      ValueError: for a stride below 1, or as many keys as there are no queries.
    """
    check_stride(stride)
    check_heads(query, key, value)
    length = query.shape[-3]
    if key.shape[-3] != length:
        raise ValueError(
            f"Attention with a stride is self-attention, but there are {length} queries and "
            f"{key.shape[-3]} keys."
        )
    if length % stride and key_mask is None:
        key_mask = jnp.ones(query.shape[:-2], bool)
    if key_mask is not None:
        options["key_mask"] = fold(key_mask, stride, trailing=0)
    if segment_ids is not None:
        # Ids of separate runs may be equal and would meet within a class.
        new_run = segment_ids[..., 1:] != segment_ids[..., :-1]
        runs = jnp.cumsum(new_run, axis=-1)
        runs = jnp.concatenate([jnp.zeros_like(runs, shape=(*runs.shape[:-1], 1)), runs], -1)
        options["segment_ids"] = fold(runs, stride, trailing=0)
    out = attention(*(fold(x, stride, trailing=2) for x in (query, key, value)), **options)
    return unfold(out, length, trailing=2)


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


def check_stride(stride: int) -> None:
    """Raises ValueError for a stride below 1."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}.")
