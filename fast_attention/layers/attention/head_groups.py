"""Computations of a layer around the attention function of a group of heads.

Shape letters: B batch, T length, S keys, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.layers.attention.attention_call import Visible
from fast_attention.layers.attention.config import HeadGroup
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.rotary import rotate


def read_keys(
    function: AttentionFn, heads: int, state: Any, key: Array, value: Array, options: dict[str, Any]
) -> Any:
    """The state after keys without queries; H is `heads`."""
    query = jnp.zeros((*key.shape[:2], heads, key.shape[-1]), key.dtype)
    return function.prefill(state, query, key, value, **options)[1]


def attend_after_memory(
    function: AttentionFn,
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None,
    options: dict[str, Any],
) -> Array:
    """Attends causally to a sequence, after its memory keys were read into a state."""
    length, (_, keys, heads, width) = query.shape[1], key.shape
    state = function.init_state((len(key),), heads, width, value.shape[-1], max_length=keys)
    memory = key[:, length:], value[:, length:]
    state = read_keys(function, query.shape[2], state, *memory, options)
    mask = None if key_mask is None else key_mask[:, :length]
    return function.prefill(
        state, query, key[:, :length], value[:, :length], key_mask=mask, **options
    )[0]


def check_causal_memory(seen: Visible, options: dict[str, Any]) -> None:
    """Raises ValueError for a call that is not supported with memory read as a state."""
    if seen.segment_ids is not None or seen.mask is not None or "dropout_rng" in options:
        raise ValueError(
            "Causal attention with memory does not support segment_ids, mask, or dropout of "
            "attention weights."
        )


def rotated(
    group: HeadGroup, query: Array, key: Array, positions: Array | None
) -> tuple[Array, Array]:
    """Rotates queries and their keys; additional keys have no position."""
    if group.rotary is None:
        return query, key
    if positions is None:
        raise ValueError("Rotary positions need positions=, the position of every token.")
    turn = functools.partial(rotate, base=group.rotary_base, interleaved=group.rotary == "pairs")
    length = query.shape[-3]
    turned = turn(query, positions + group.query_offset)
    if query.ndim == 4 and key.shape[1] > length:
        own = turn(key[:, :length], positions)
        return turned, jnp.concatenate([own, key[:, length:]], axis=1)
    return turned, turn(key, positions)
