"""Decoding with a near field: the last keys as they are, those before them as one state.

Shape letters: B batch, T new tokens, H heads, K key/value heads, D head width, V value width, M
features, W window.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32, widest
from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear.decode import step_parts
from fast_attention.linear.state import LinearAttentionState, typed_like
from fast_attention.linear.state import empty_state as empty_linear_state
from fast_attention.linear.types import Inputs, Plan, finish, merge_parts
from fast_attention.mechanisms.favor.near_field import fused
from fast_attention.mechanisms.favor.near_field.near_and_far import (
    check_options,
    far_plan,
    parts_of_softmax,
    settled,
)
from fast_attention.mechanisms.favor.near_field.window import Reach
from fast_attention.mechanisms.local.tile import Choices, Sight, Tile, attend_tile


class NearFieldState(NamedTuple):
    """What decoding remembers; its size does not depend on the tokens so far.

    Attributes:
      far: the keys that have left the window.
      key: ``[*B, W, K, D]``, those in it; the token at position t is in slot ``t % W``.
      value: ``[*B, W, K, V]``.
      length: ``[*B]`` int32, tokens so far of each row, padding not counted.
    """

    far: LinearAttentionState
    key: Float[Array, "*B W K D"]
    value: Float[Array, "*B W K V"]
    length: Int[Array, "*B"]


def empty_state(
    feature_map: FeatureMap,
    parameters: Parameters,
    exact_window: int,
    batch_shape: tuple[int, ...],
    num_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: Any = None,
) -> NearFieldState:
    """Returns the state before the first token.

    Args:
      feature_map: the map that will be used.
      parameters: its parameters.
      exact_window: W.
      batch_shape: ``*B``.
      num_heads: K, key/value heads.
      head_dim: D.
      value_dim: V.
      dtype: float32 or float64; None is float64 under ``jax_enable_x64`` and float32 otherwise.
    """
    check_options(exact_window, Plan(feature_map))
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    slots = (*batch_shape, exact_window, num_heads)
    return NearFieldState(
        far=empty_linear_state(
            feature_map, parameters, batch_shape, num_heads, head_dim, value_dim, dtype
        ),
        key=jnp.zeros((*slots, head_dim), dtype),
        value=jnp.zeros((*slots, value_dim), dtype),
        length=jnp.zeros(batch_shape, jnp.int32),
    )


def prefill(
    state: NearFieldState,
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    plan: Plan,
    *,
    parameters: Parameters,
    key_mask: Bool[Array, "*B T"] | None = None,
) -> tuple[Float[Array, "*B T H V"], NearFieldState]:
    """Reads T tokens causally after those already in ``state``.

    Args:
      state: what came before.
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      plan: as in :func:`.near_field_attention`.
      parameters: of its feature map.
      key_mask: ``[*B, T]``; False is padding on either side of a shorter prompt: it takes no place.

    Returns:
      Outputs ``[*B, T, H, V]``, zeros at padding, and the state after the tokens.
    """
    batch_shape = query.shape[:-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if key_mask is not None:
        key_mask = key_mask.astype(bool).reshape(-1, query.shape[1])
    out, new = _prefill(
        far_plan(plan, plan.output),
        _folded(state, batch_shape),
        query,
        key,
        value,
        key_mask,
        parameters,
    )
    return out.reshape(*batch_shape, *out.shape[1:]), _unfolded(new, batch_shape)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    plan: Plan,
    state: NearFieldState,
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None,
    parameters: Any,
) -> tuple[Array, NearFieldState]:
    window, new = state.key.shape[1], query.shape[1]
    dtype = jnp.result_type(query, key, value)
    count = jnp.full(query.shape[:1], new, jnp.int32)
    rank = None
    if key_mask is not None:
        # Tokens move up, so that there is no padding between them.
        count = key_mask.sum(axis=1, dtype=jnp.int32)
        rank = jnp.maximum(jnp.cumsum(key_mask, axis=1, dtype=jnp.int32) - 1, 0)
        order = jnp.argsort(~key_mask, axis=1, stable=True)
        query, key, value = (_taken(x, order) for x in (query, key, value))
    # The window in the order of its positions, then the new tokens.
    place = jnp.arange(window, dtype=jnp.int32)[None]
    before = (state.length[:, None] + place) % window
    in_use = place >= window - state.length[:, None]
    wide = widest(state.key.dtype, dtype)
    keys = jnp.concatenate([_taken(state.key, before).astype(wide), key.astype(wide)], axis=1)
    values = [_taken(state.value, before).astype(wide), value.astype(wide)]
    values = jnp.concatenate(values, axis=1)
    arriving = jnp.arange(new, dtype=jnp.int32)[None] < count[:, None]
    visible = jnp.concatenate([in_use, arriving], axis=1)[..., None]
    # Of the far keys those count that a token of this call pushes out of the window.
    leaving = visible[:, :new] & arriving[..., None]
    query, keys_, values_ = (x.astype(dtype) for x in (query, keys, values))
    inputs = Inputs(
        query,
        keys_,
        values_,
        parameters,
        key_mask=visible,
        key_bias=None,
        segment_ids=None,
        state=jax.tree.map(lambda x: x.astype(at_least_float32(dtype)), state.far),
    )
    operands = fused.Operands(vary_alike(inputs), leaving)
    attended: Any = fused.attend(plan, Reach(window), operands)
    out, far_state = attended
    if key_mask is not None:
        assert rank is not None
        out = jnp.where(key_mask[..., None, None], _taken(out, rank), 0)
    # The latest position of each slot, counted from the first of the window before.
    length = state.length + count
    last = (length - 1)[:, None]
    latest = last - (last - place) % window - state.length[:, None] + window
    after = NearFieldState(far_state, _taken(keys, latest), _taken(values, latest), length)
    return out, typed_like(after, state)


def step(
    state: NearFieldState,
    query: Float[Array, "*B H D"],
    key: Float[Array, "*B K D"],
    value: Float[Array, "*B K V"],
    plan: Plan,
    *,
    parameters: Parameters,
) -> tuple[Float[Array, "*B H V"], NearFieldState]:
    """Reads one token: the oldest of the window goes over to the far ones.

    Args:
      state: what came before.
      query: ``[*B, H, D]``.
      key: ``[*B, K, D]``.
      value: ``[*B, K, V]``.
      plan: its feature map, output, epsilon and precision are read.
      parameters: of its feature map.

    Returns:
      Output ``[*B, H, V]`` in the promoted type of the inputs, and the new state.
    """
    batch_shape, dtype = query.shape[:-2], jnp.result_type(query, key, value)
    old = _folded(state, batch_shape)
    query, key, value = (x.reshape(-1, *x.shape[-2:]).astype(dtype) for x in (query, key, value))
    window = old.key.shape[1]
    rows, slot = jnp.arange(query.shape[0]), old.length % window
    far, far_state = step_parts(
        old.far,
        query,
        old.key[rows, slot],
        old.value[rows, slot],
        plan,
        parameters=parameters,
        visible=old.length >= window,
    )
    keys = old.key.at[rows, slot].set(key.astype(old.key.dtype))
    values = old.value.at[rows, slot].set(value.astype(old.value.dtype))
    # Slots fill in order: until all are in use, those behind the new token are empty.
    last = jnp.minimum(old.length, window - 1)[:, None]
    choices = Choices(block=1, back=0, ahead=0, causal=True, precision=plan.precision)
    tile = Tile(
        query[:, None],
        keys.astype(dtype),
        values.astype(dtype),
        Sight(jnp.zeros_like(last), last),
    )
    out, logsumexp = jax.vmap(lambda tile: attend_tile(tile, jnp.zeros(1, int), choices))(tile)
    near = parts_of_softmax(out[:, 0], logsumexp[:, 0])
    out = finish(merge_parts(near, settled(far)), plan.output, plan.epsilon)
    new = NearFieldState(far_state, keys, values, old.length + 1)
    return out.astype(dtype).reshape(*batch_shape, *out.shape[1:]), _unfolded(new, batch_shape)


def _taken(x: Array, index: Array) -> Array:
    """Takes positions ``[B, N]`` of ``[B, T, H, D]``."""
    return jnp.take_along_axis(x, index[..., None, None], axis=1)


def _folded(state: NearFieldState, batch_shape: tuple[int, ...]) -> NearFieldState:
    rows, axes = math.prod(batch_shape), len(batch_shape)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[axes:]), state)


def _unfolded(state: NearFieldState, batch_shape: tuple[int, ...]) -> NearFieldState:
    return jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), state)
