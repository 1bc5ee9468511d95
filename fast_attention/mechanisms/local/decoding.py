"""Decoding with local attention: a ring of the last keys and values, constant in the length.

Shape letters: B batch, T new tokens, H heads, K key/value heads, D head width, V value width,
W window, S = W * (look_backward + 1) slots.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.checks import fold_batch
from fast_attention.mechanisms.local.blocks import tiled_attention
from fast_attention.mechanisms.local.tile import Choices, Sight, Tile, attend_tile
from fast_attention.mechanisms.local.window import LocalWindow, check_shapes
from fast_attention.mechanisms.ring import (
    Ring,
    extend,
    fold_state,
    in_given_order,
    push,
    unfold_state,
)
from fast_attention.mechanisms.shared_qk import unit_keys


def slots_of(window: LocalWindow) -> int:
    """Returns S: as many keys as a causal window ever has in sight."""
    return window.window_size * (window.look_backward + 1)


def prefill(
    window: LocalWindow,
    state: Ring,
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    *,
    key_mask: Bool[Array, "*B T"] | None,
    shared_qk: bool,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "*B T H V"], Ring]:
    """Reads T tokens after those in ``state``.

    Args:
      window: a causal one.
      state: the last keys of the tokens before.
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      key_mask: False is padding: it takes no place.
      shared_qk: as in :func:`fast_attention.local_attention`.
      precision: of the products.

    Returns:
      ``[*B, T, H, V]``, zeros at padding, and the state after the tokens.
    """
    batch_shape, dtype = query.shape[:-3], query.dtype
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if key_mask is not None:
        key_mask = key_mask.astype(bool).reshape(-1, query.shape[1])
    ring = fold_state(state, batch_shape)
    tokens = extend(ring, query, key, value, key_mask)
    keys, values = tokens.key.astype(dtype), tokens.value.astype(dtype)
    # Positions are counted from the first new token; the keys of the ring lie before it.
    place = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    first, _ = window.bounds(ring.length[:, None] + place)
    out = tiled_attention(
        tokens.query,
        unit_keys(keys) if shared_qk else keys,
        values,
        Sight(first - ring.length[:, None], place, tokens.visible),
        None,
        Choices(1, slots_of(window), 0, causal=True, shared=shared_qk, precision=precision),
        around=True,
    )
    out = in_given_order(tokens, out, key_mask)
    return out.reshape(*batch_shape, *out.shape[1:]), unfold_state(tokens.ring, batch_shape)


def step(
    window: LocalWindow,
    state: Ring,
    query: Float[Array, "*B H D"],
    key: Float[Array, "*B K D"],
    value: Float[Array, "*B K V"],
    *,
    shared_qk: bool,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "*B H V"], Ring]:
    """Reads one token, see :func:`prefill`: time and memory do not depend on those before."""
    batch_shape, slots = query.shape[:-2], slots_of(window)
    query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    before = fold_state(state, batch_shape)
    ring = push(before, key, value)
    own = before.length[:, None]
    position = own - (own - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    first, _ = window.bounds(own)
    keys = (unit_keys(ring.key) if shared_qk else ring.key).astype(query.dtype)
    whole = jnp.zeros_like(own)
    sight = Sight(whole, whole + slots - 1, key_mask=position >= jnp.maximum(first, 0))
    tile = Tile(query[:, None], keys, ring.value.astype(query.dtype), sight)
    choices = Choices(slots, 0, 0, causal=True, shared=shared_qk, precision=precision)
    out, _ = jax.vmap(lambda tile, own: attend_tile(tile, own, choices))(tile, own % slots)
    return out.reshape(*batch_shape, *out.shape[2:]), unfold_state(ring, batch_shape)


def attend_from_one(
    window: LocalWindow,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    key_mask: Array | None,
    *,
    shared_qk: bool,
    dropout: Dropout | None,
    precision: jax.lax.PrecisionLike,
) -> Array:
    """Attends from one query to a cache: it stands at the last key that is not masked.

    Args:
      window: the window.
      query: ``[*B, 1, H, D]``.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      bias: broadcastable to ``[*B, H, 1, S]``.
      mask: broadcastable to ``[*B, H, 1, S]``.
      key_mask: broadcastable to ``[*B, S]``.
      shared_qk: as in :func:`fast_attention.local_attention`; so are the rest.
      dropout: of the weights.
      precision: of the products.

    Returns:
      ``[*B, 1, H, V]``.
    """
    check_shapes(query, key, value, cached=True)
    *batch, length, _, _ = key.shape
    heads = query.shape[-2]
    rows = math.prod(batch)
    seen = jnp.ones((1, 1, 1, length), bool)
    if mask is not None:
        seen = seen & fold_batch("mask", mask, batch, (heads, 1, length)).astype(bool)
    if key_mask is not None:
        key_mask = fold_batch("key_mask", key_mask, batch, (length,)).astype(bool)
        seen = seen & key_mask[:, None, None]
    place = jnp.arange(length, dtype=jnp.int32)
    shown = seen.any(axis=(1, 2))
    position = jnp.max(jnp.where(shown, place[None], -1), axis=-1, keepdims=True)
    first, _ = window.bounds(position)
    if bias is not None:
        bias = fold_batch("bias", bias, batch, (heads, 1, length))
    if shared_qk:
        key = unit_keys(key)
    drop = None
    if dropout is not None:
        same = jnp.zeros(rows, jnp.int32) if dropout.broadcast else jnp.arange(rows)
        drop = jax.vmap(functools.partial(jax.random.fold_in, dropout.key))(same)
    choices = Choices(
        block=1,
        back=0,
        ahead=0,
        causal=window.causal,
        shared=shared_qk,
        dropout_rate=0.0 if dropout is None else dropout.rate,
        share_dropout=dropout is None or dropout.broadcast,
        precision=precision,
    )
    sight = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])),
        Sight(first, position, mask=seen, bias=bias),
    )
    query, key, value = (x.reshape(rows, *x.shape[-3:]) for x in (query, key, value))
    own = jnp.broadcast_to(position, (rows, 1))
    attend = jax.vmap(lambda tile, own: attend_tile(tile, own, choices)[0])
    out = attend(Tile(query, key, value, sight, drop), own)
    return out.reshape(*batch, 1, heads, -1)
