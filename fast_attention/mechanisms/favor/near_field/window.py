"""Softmax weights of a few rows on the window of keys about them, and their gradients.

Layout and letters are those of :mod:`fast_attention.linear.chunked.chunk_state`, with S keys in a
window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.slices import compute_dtype, load, load_rows
from fast_attention.linear.rounded_products import Einsum
from fast_attention.linear.state import EMPTY_LOG_SCALE
from fast_attention.linear.types import Inputs


class Reach(NamedTuple):
    """Which keys are near: those from ``nearest`` to ``distance - 1`` positions before a row."""

    distance: int
    nearest: int = 0


class Window(NamedTuple):
    """Some rows and a stretch of keys that has all their near ones.

    Attributes:
      rows: queries ``[B, K, R, D]``.
      key: ``[B, K, S, D]``.
      value: ``[B, K, S, V]``.
      bias: ``[B, K or 1, S]``, or None.
      seen: bool, broadcastable to ``[B, K, R, S]``: key is near the row, and visible.
    """

    rows: Array
    key: Array
    value: Array
    bias: Array | None
    seen: Array


def load_window(
    inputs: Inputs, reach: Reach, row: Array | int, rows: int, start: Array | int, size: int
) -> Window:
    """Returns the queries from ``row`` on, and keys of ``[start, start + size)``.

    Args:
      inputs: the whole arrays; there may be more keys than queries, in front of them.
      reach: which keys are near.
      row: the first query.
      rows: how many.
      start: the first key.
      size: how many.
    """
    dtype = compute_dtype(inputs)
    key, value = (load(x, start, size, dtype) for x in (inputs.key, inputs.value))
    front = inputs.key.shape[1] - inputs.query.shape[1]
    back = jnp.arange(rows)[:, None] - jnp.arange(size)[None] + (row + front - start)
    seen = ((back >= reach.nearest) & (back < reach.distance))[None, None]
    if inputs.segment_ids is not None:
        ids = (
            jax.lax.dynamic_slice_in_dim(inputs.segment_ids, first, count, axis=1)
            for first, count in ((row, rows), (start, size))
        )
        row_ids, key_ids = ids
        seen = seen & (row_ids[:, None, :, None] == key_ids[:, None, None, :])
    groups = inputs.query.shape[2] // inputs.key.shape[2]
    seen = jnp.tile(seen, (1, 1, groups, 1))
    if inputs.key_mask is not None:
        visible = load(inputs.key_mask, start, size)
        # Whatever lies in padding, nan and inf included, must not reach a product.
        key, value = (jnp.where(visible[..., None], x, 0) for x in (key, value))
        seen = seen & visible[:, :, None]
    bias = None if inputs.key_bias is None else load(inputs.key_bias, start, size, dtype)
    return Window(load_rows(inputs, inputs.query, row, rows, dtype), key, value, bias, seen)


def window_logits(window: Window, einsum: Einsum) -> Array:
    """Returns logits ``[B, K, R, S]``, ``-inf`` where a row does not see a key."""
    width = window.key.shape[-1]
    logits = einsum("bkrd,bksd->bkrs", window.rows, window.key) * width**-0.5
    if window.bias is not None:
        logits = logits + window.bias[:, :, None]
    return jnp.where(window.seen, logits, -jnp.inf)


def largest_logit(logits: Array) -> Array:
    """Returns the scale that rows need for their near keys, ``[B, K, R]``."""
    return jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1), EMPTY_LOG_SCALE))


class WindowGradients(NamedTuple):
    """Cotangents of :class:`Window`, ``[B, K, ...]`` as there."""

    rows: Array
    key: Array
    bias: Array | None


def pull_back_window(
    window: Window, weights: Array, d_weights: Array, einsum: Einsum
) -> WindowGradients:
    """Pulls the cotangent of ``exp(logits - constant)`` back to rows, keys and biases."""
    # A weight that underflowed has no gradient, also where its cotangent overflowed.
    d_logits = jnp.where(weights == 0, 0, weights * d_weights)
    scale = window.key.shape[-1] ** -0.5
    d_bias = None
    if window.bias is not None:
        d_bias = d_logits.sum(axis=-2)
        if window.bias.shape[1] == 1:
            d_bias = d_bias.sum(axis=1, keepdims=True)
    return WindowGradients(
        einsum("bkrs,bksd->bkrd", d_logits, window.key) * scale,
        einsum("bkrs,bkrd->bksd", d_logits, window.rows) * scale,
        d_bias,
    )
