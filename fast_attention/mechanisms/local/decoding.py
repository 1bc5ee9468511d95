"""Decoding with local attention: a ring of the last keys and values, constant in the length.

Shape letters: B batch, T new tokens, H heads, K key/value heads, D head width, V value width,
W window, S = W * (look_backward + 1) slots.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.local.op import local_attention, normalized
from fast_attention.mechanisms.local.tile import Choices, Sight, Tile, attend_tile
from fast_attention.mechanisms.local.window import Window, check_shapes, fold_batch


class LocalState(NamedTuple):
    """The last keys and values: the decoding state of local attention.

    Attributes:
      key: ``[*B, S, K, D]`` float32; the token at position t is in slot ``t % S``.
      value: ``[*B, S, K, V]`` float32.
      length: ``[*B]`` int32, tokens so far of each row, padding not counted.
    """

    key: Float[Array, "*B S K D"]
    value: Float[Array, "*B S K V"]
    length: Int[Array, "*B"]


def empty_state(
    window: Window,
    batch_shape: Sequence[int],
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: jnp.dtype = jnp.float32,
) -> LocalState:
    """Returns the state before the first token."""
    slots = (*batch_shape, window.size * (window.look_backward + 1), num_kv_heads)
    return LocalState(
        key=jnp.zeros((*slots, head_dim), dtype),
        value=jnp.zeros((*slots, value_dim), dtype),
        length=jnp.zeros(tuple(batch_shape), jnp.int32),
    )


def prefill(
    window: Window,
    state: LocalState,
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    *,
    key_mask: Bool[Array, "*B T"] | None,
    shared_qk: bool,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "*B T H V"], LocalState]:
    """Reads T tokens after those in ``state``.

    Args:
      window: a causal one.
      state: what came before.
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      key_mask: False is padding: it takes no place.
      shared_qk: as in :func:`fast_attention.local_attention`.
      precision: of the products.

    Returns:
      ``[*B, T, H, V]``, zeros at padding, and the state after the tokens.
    """
    *batch, new = query.shape[:-2]
    if key_mask is None:
        key_mask = jnp.ones((*batch, new), bool)
    slots = state.key.shape[-3]
    context = window.size * window.look_backward
    # A sequence of all that can be in sight, from the block boundary where that of the first new
    # token begins: the state, then the new tokens, without padding between them.
    length = slots + new

    def row(
        state: LocalState, query: Array, key: Array, value: Array, kept: Array
    ) -> tuple[Array, LocalState]:
        begin = state.length // window.size * window.size - context
        place = jnp.arange(length, dtype=jnp.int32)
        old = state.length - begin
        count = jnp.sum(kept, dtype=jnp.int32)
        order = jnp.argsort(~kept, stable=True)
        token = jnp.take(order, jnp.clip(place - old, 0, new - 1))
        slot = (begin + place) % slots

        def sequence(before: Array, after: Array) -> Array:
            is_old = (place < old)[:, None, None]
            return jnp.where(is_old, before[slot], after[token].astype(before.dtype))

        keys, values = sequence(state.key, key), sequence(state.value, value)
        out = local_attention(
            query[token],
            keys.astype(query.dtype),
            values.astype(query.dtype),
            window_size=window.size,
            causal=True,
            look_backward=window.look_backward,
            exact_window=window.exact,
            shared_qk=shared_qk,
            precision=precision,
            key_mask=(begin + place >= 0) & (place < old + count),
        )
        rank = jnp.cumsum(kept, dtype=jnp.int32) - 1
        out = jnp.where(kept[:, None, None], out[jnp.clip(old + rank, 0, length - 1)], 0)
        # The last position of each slot; what lies before the sequence is out of sight for good.
        last = old + count - 1
        held = jnp.arange(slots, dtype=jnp.int32)
        latest = jnp.clip(last - (begin + last - held) % slots, 0, length - 1)
        return out, LocalState(keys[latest], values[latest], state.length + count)

    if new == 0:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype), state
    for _ in batch:
        row = jax.vmap(row)
    return row(state, query, key, value, key_mask.astype(bool))


def step(
    window: Window,
    state: LocalState,
    query: Float[Array, "*B H D"],
    key: Float[Array, "*B K D"],
    value: Float[Array, "*B K V"],
    *,
    shared_qk: bool,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "*B H V"], LocalState]:
    """Reads one token, see :func:`prefill`: time and memory do not depend on those before."""
    slots = state.key.shape[-3]
    choices = Choices(slots, 0, 0, causal=True, shared=shared_qk, precision=precision)

    def row(state: LocalState, query: Array, key: Array, value: Array) -> tuple[Array, LocalState]:
        slot = state.length % slots
        keys = state.key.at[slot].set(key.astype(state.key.dtype))
        values = state.value.at[slot].set(value.astype(state.value.dtype))
        position = state.length - (state.length - jnp.arange(slots, dtype=jnp.int32)) % slots
        first, _ = window.bounds(state.length)
        seen = position >= jnp.maximum(first, 0)
        tile = Tile(
            query[None],
            (normalized(keys) if shared_qk else keys).astype(query.dtype),
            values.astype(query.dtype),
            Sight(jnp.zeros(1, jnp.int32), jnp.full(1, slots - 1), key_mask=seen),
        )
        out, _ = attend_tile(tile, slot[None], choices)
        return out[0], LocalState(keys, values, state.length + 1)

    for _ in query.shape[:-2]:
        row = jax.vmap(row)
    return row(state, query, key, value)


def attend_from_one(
    window: Window,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    key_mask: Array | None,
    *,
    shared_qk: bool,
    dropout_key: Array | None,
    dropout_rate: float,
    broadcast_dropout: bool,
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
      dropout_key: random key or None.
      dropout_rate: of the weights.
      broadcast_dropout: the batch and the heads share the dropped weights.
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
        key = normalized(key)
    drop = None
    if dropout_key is not None:
        same = jnp.zeros(rows, jnp.int32) if broadcast_dropout else jnp.arange(rows)
        drop = jax.vmap(functools.partial(jax.random.fold_in, dropout_key))(same)
    choices = Choices(
        block=1,
        back=0,
        ahead=0,
        causal=window.causal,
        shared=shared_qk,
        dropout_rate=dropout_rate,
        share_dropout=broadcast_dropout,
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
