"""The last keys and values of each row in a ring, for decoding that looks back a fixed way.

Shape letters: B batch, T new tokens, H heads, K key/value heads, D head width, V value width,
S slots.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import widest
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.linear.state import typed_like

Tree = TypeVar("Tree")


class Ring(NamedTuple):
    """The last keys and values.

    Attributes:
      key: ``[*B, S, K, D]``; the token at position t is in slot ``t % S``.
      value: ``[*B, S, K, V]``.
      length: ``[*B]`` int32, tokens so far of each row, padding not counted.
      decayed: ``[*B, S, K]``, the sum of ``log_decay`` of the tokens after that of the slot; None
        for a state without decay.
    """

    key: Float[Array, "*B S K D"]
    value: Float[Array, "*B S K V"]
    length: Int[Array, "*B"]
    decayed: Float[Array, "*B S K"] | None = None


class Extended(NamedTuple):
    """New tokens behind those of a ring, without padding between them.

    Attributes:
      query: ``[B, T, H, D]``, the queries of the new tokens; padding comes last.
      key: ``[B, S + T, K, D]``, the slots in the order of their positions, then the new tokens.
      value: ``[B, S + T, K, V]``.
      visible: ``[B, S + T]``, False in empty slots and at padding.
      ring: the ring after the new tokens.
      rank: ``[B, T]`` int, the place of each given token in `query`; None without padding.
      log_decay: ``[B, S + T, K]`` as `key`, or None. What the first one decays is not known.
    """

    query: Float[Array, "B T H D"]
    key: Float[Array, "B N K D"]
    value: Float[Array, "B N K V"]
    visible: Bool[Array, "B N"]
    ring: Ring
    rank: Int[Array, "B T"] | None
    log_decay: Float[Array, "B N K"] | None = None


def empty_ring(
    batch_shape: tuple[int, ...],
    slots: int,
    widths: tuple[int, int, int],
    dtype: Any,
    decays: bool = False,
) -> Ring:
    """Returns the ring before the first token; `widths` are K, D and V."""
    heads, head_dim, value_dim = widths
    return Ring(
        key=jnp.zeros((*batch_shape, slots, heads, head_dim), dtype),
        value=jnp.zeros((*batch_shape, slots, heads, value_dim), dtype),
        length=jnp.zeros(batch_shape, jnp.int32),
        decayed=jnp.zeros((*batch_shape, slots, heads), dtype) if decays else None,
    )


def extend(
    ring: Ring,
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None,
    log_decay: Array | None = None,
) -> Extended:
    """Puts new tokens behind those of a ring.

    Args:
      ring: with one batch axis.
      query: ``[B, T, H, D]``.
      key: ``[B, T, K, D]``.
      value: ``[B, T, K, V]``.
      key_mask: ``[B, T]`` bool or None; False is padding: it takes no place.
      log_decay: ``[B, T, K]``, 0 at padding; as the ring, None without decay.
    """
    slots, new = ring.key.shape[1], query.shape[1]
    count = jnp.full(query.shape[:1], new, jnp.int32)
    rank = None
    if key_mask is not None:
        count = key_mask.sum(axis=1, dtype=jnp.int32)
        rank = jnp.maximum(jnp.cumsum(key_mask, axis=1, dtype=jnp.int32) - 1, 0)
        order = jnp.argsort(~key_mask, axis=1, stable=True)
        query, key, value = (_taken(x, order) for x in (query, key, value))
        log_decay = None if log_decay is None else _taken(log_decay, order)
    place = jnp.arange(slots, dtype=jnp.int32)[None]
    before = (ring.length[:, None] + place) % slots

    def behind(old: Array, new: Array) -> Array:
        wide = widest(old.dtype, new.dtype)
        return jnp.concatenate([_taken(old, before).astype(wide), new.astype(wide)], axis=1)

    key, value = behind(ring.key, key), behind(ring.value, value)
    in_use = place >= slots - ring.length[:, None]
    arriving = jnp.arange(new, dtype=jnp.int32)[None] < count[:, None]
    visible = jnp.concatenate([in_use, arriving], axis=1)
    # The latest position of each slot, counted from the first position in `key`.
    length = ring.length + count
    last = (length - 1)[:, None]
    latest = last - (last - place) % slots - ring.length[:, None] + slots
    decayed = None
    if log_decay is not None:
        assert ring.decayed is not None
        old = _taken(ring.decayed, before)
        first = jnp.zeros_like(old[:, :1])
        steps = jnp.concatenate([first, old[:, :-1] - old[:, 1:]], axis=1)
        log_decay = jnp.concatenate([steps, log_decay.astype(old.dtype)], axis=1)
        decayed = _taken(_decayed_since(log_decay, count, slots), (place - length[:, None]) % slots)
    after = Ring(_taken(key, latest), _taken(value, latest), length, decayed)
    return Extended(query, key, value, visible, typed_like(after, ring), rank, log_decay)


def _decayed_since(log_decay: Array, count: Array, slots: int) -> Array:
    """Sums the decays after each of the last tokens, in their order, ``[B, S, K]``."""
    last = count[:, None] + jnp.arange(slots, dtype=jnp.int32)[None]
    until = jnp.flip(jnp.cumsum(jnp.flip(_taken(log_decay, last), 1), axis=1), 1)
    return jnp.pad(until[:, 1:], ((0, 0), (0, 1), (0, 0)))


def in_given_order(extended: Extended, out: Array, key_mask: Array | None) -> Array:
    """Brings outputs ``[B, T, H, V]`` of `extended.query` to the given tokens, 0 at padding."""
    if key_mask is None or extended.rank is None:
        return out
    return jnp.where(key_mask[..., None, None], _taken(out, extended.rank), 0)


def push(ring: Ring, key: Array, value: Array) -> Ring:
    """Puts one token ``[B, K, D]`` in the place of the oldest."""
    rows, slot = jnp.arange(len(key), dtype=jnp.int32), ring.length % ring.key.shape[1]
    return Ring(
        ring.key.at[rows, slot].set(key.astype(ring.key.dtype)),
        ring.value.at[rows, slot].set(value.astype(ring.value.dtype)),
        ring.length + 1,
        None if ring.decayed is None else ring.decayed.at[rows, slot].set(0),
    )


def fold_state(state: Tree, batch_shape: tuple[int, ...]) -> Tree:
    """Makes one batch axis of ``*B``."""
    rows, axes = math.prod(batch_shape), len(batch_shape)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[axes:]), state)


def unfold_state(state: Tree, batch_shape: tuple[int, ...]) -> Tree:
    """Makes ``*B`` of one batch axis."""
    return jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), state)


def _taken(x: Array, index: Array) -> Array:
    """Takes positions ``[B, N]`` of ``[B, T, ...]``."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
