"""Softmax weights of a few rows on the window of keys about them, and their gradients.

Layout and letters are those of :mod:`fast_attention.linear.chunked.chunk_state`, with S keys in a
window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.chunk_decay import decay_until
from fast_attention.linear.chunked.slices import (
    compute_dtype,
    load,
    load_contiguous,
    load_rows,
)
from fast_attention.linear.rounded_products import Einsum, sums
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
      place: of the first row among the keys.
      decay: ``[B, K, C, S]``, logarithm of the decay of a key until a position, or None. C is R
        over the query heads that share a key head.
    """

    rows: Array
    key: Array
    value: Array
    bias: Array | None
    seen: Array
    place: Array | int
    decay: Array | None


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
    key, value = (load_contiguous(x, start, size, dtype) for x in (inputs.key, inputs.value))
    front = inputs.key.shape[1] - inputs.query.shape[1]
    place = row + front - start
    back = jnp.arange(rows)[:, None] - jnp.arange(size)[None] + place
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
    decay = None
    if inputs.log_decay is not None:
        # The differences are taken before the addition: see `decay_until`.
        coarse, rest = (
            jax.lax.dynamic_slice_in_dim(x, place, rows, axis=-1)[..., :, None] - x[..., None, :]
            for x in decay_until(load(inputs.log_decay, start, size, dtype))
        )
        decay = coarse + rest
    queries = load_rows(inputs, inputs.query, row, rows, dtype)
    return Window(queries, key, value, bias, seen, place, decay)


def window_logits(window: Window, einsum: Einsum) -> Array:
    """Returns logits ``[B, K, R, S]``, ``-inf`` where a row does not see a key."""
    width = window.key.shape[-1]
    logits = einsum("bkrd,bksd->bkrs", window.rows, window.key) * width**-0.5
    if window.bias is not None:
        logits = logits + window.bias[:, :, None]
    if window.decay is not None:
        groups = logits.shape[-2] // window.decay.shape[-2]
        logits = logits + jnp.tile(window.decay, (1, 1, groups, 1))
    return jnp.where(window.seen, logits, -jnp.inf)


def largest_logit(logits: Array) -> Array:
    """Returns the scale that rows need for their near keys, ``[B, K, R]``."""
    return jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1), EMPTY_LOG_SCALE))


class WindowGradients(NamedTuple):
    """Cotangents of :class:`Window`, ``[B, K, ...]`` as there.

    Attributes:
      rows: as there.
      key: as there.
      bias: as there.
      log_decay: of the decays of single tokens, ``[B, K, S]``, or None.
    """

    rows: Array
    key: Array
    bias: Array | None
    log_decay: Array | None


def pull_back_window(
    window: Window, weights: Array, d_weights: Array, einsum: Einsum
) -> WindowGradients:
    """Pulls the cotangent of ``exp(logits - constant)`` back to what makes the logits."""
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
        None if window.decay is None else _pull_back_decay(window, d_logits),
    )


def _pull_back_decay(window: Window, d_logits: Array) -> Array:
    """Returns the cotangents ``[B, K, S]`` of the decays of tokens, from those of pairs."""
    assert window.decay is not None
    rows, size = window.decay.shape[-2:]
    pairs = d_logits.reshape(*d_logits.shape[:2], -1, rows, size).sum(axis=2)
    position = jnp.arange(size)
    own = position[None] == jnp.arange(rows)[:, None] + window.place
    # A key has not decayed for its own row.
    pairs = jnp.where(own[None, None], 0, pairs)
    of_rows = sums("bkrs,s->bkr", pairs, jnp.ones(size, pairs.dtype))
    of_keys = pairs.sum(axis=-2)
    until = jax.lax.dynamic_update_slice_in_dim(
        jnp.zeros_like(of_keys), of_rows, window.place, axis=-1
    )
    # A token decays what the rows from it on read of the keys before it.
    past = (position[:, None] >= position[None]).astype(pairs.dtype)
    from_on = sums("bkt,ts->bks", until - of_keys, past)
    return jnp.where((position > 0)[None, None], from_on, 0)
