"""Decoding with a near field: the last keys as they are, those before them as one state.

Shape letters: B batch, T new tokens, H heads, K key/value heads, D head width, V value width, M
features, W window.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear.decay import decay_of_tokens, spread_decay
from fast_attention.linear.decode import step_parts
from fast_attention.linear.state import LinearAttentionState, decayed, typed_like
from fast_attention.linear.state import empty_state as empty_linear_state
from fast_attention.linear.types import Inputs, Plan, finish, merge_parts
from fast_attention.mechanisms.favor.near_field import fused
from fast_attention.mechanisms.favor.near_field.decay import bias_of_far_keys
from fast_attention.mechanisms.favor.near_field.near_and_far import (
    check_options,
    far_plan,
    parts_of_softmax,
    settled,
)
from fast_attention.mechanisms.favor.near_field.walk import Operands
from fast_attention.mechanisms.favor.near_field.window import Reach
from fast_attention.mechanisms.local.tile import Choices, Sight, Tile, attend_tile
from fast_attention.mechanisms.ring import (
    Ring,
    empty_ring,
    extend,
    fold_state,
    in_given_order,
    push,
    unfold_state,
)


class NearFieldState(NamedTuple):
    """What decoding remembers; its size does not depend on the tokens so far.

    Attributes:
      far: the keys that have left the window.
      near: the W last keys.
    """

    far: LinearAttentionState
    near: Ring


def empty_state(
    feature_map: FeatureMap,
    parameters: Parameters,
    exact_window: int,
    batch_shape: tuple[int, ...],
    num_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: Any = None,
    decays: bool = False,
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
      decays: whether it will be read with ``log_decay``.
    """
    check_options(exact_window, Plan(feature_map))
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    sizes = num_heads, head_dim, value_dim
    return NearFieldState(
        far=empty_linear_state(feature_map, parameters, batch_shape, *sizes, dtype),
        near=empty_ring(batch_shape, exact_window, sizes, dtype, decays),
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
    log_decay: Float[Array, "*B T K"] | Float[Array, "*#B K"] | None = None,
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
      log_decay: as there. The state must have been made with ``decays=True``; such a state keeps
        its decays in calls without.

    Returns:
      Outputs ``[*B, T, H, V]``, zeros at padding, and the state after the tokens.

    Raises:
      ValueError: for decays with a state that was made without.
    """
    batch_shape = query.shape[:-3]
    mask = None
    if key_mask is not None:
        key_mask = key_mask.astype(bool).reshape(-1, query.shape[-3])
        mask = key_mask[..., None]
    log_decay = decay_of_tokens(
        _known_decay(state, log_decay, key), key, mask, causal=True, dtype=state.near.key.dtype
    )
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    out, new = _prefill(
        far_plan(plan, plan.output),
        fold_state(state, batch_shape),
        query,
        key,
        value,
        key_mask,
        log_decay,
        parameters,
    )
    return out.reshape(*batch_shape, *out.shape[1:]), unfold_state(new, batch_shape)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    plan: Plan,
    state: NearFieldState,
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None,
    log_decay: Array | None,
    parameters: Any,
) -> tuple[Array, NearFieldState]:
    window, new = state.near.key.shape[1], query.shape[1]
    dtype = jnp.result_type(query, key, value)
    tokens = extend(state.near, query, key, value, key_mask, log_decay)
    # Of the far keys those count that a token of this call pushes out of the window.
    leaving = tokens.visible[:, :new] & tokens.visible[:, window:]
    inputs = Inputs(
        query=tokens.query.astype(dtype),
        key=tokens.key.astype(dtype),
        value=tokens.value.astype(dtype),
        parameters=parameters,
        key_mask=tokens.visible[..., None],
        key_bias=None,
        segment_ids=None,
        state=jax.tree.map(lambda x: x.astype(at_least_float32(dtype)), state.far),
        log_decay=tokens.log_decay,
    )
    inputs = vary_alike(inputs)
    far_bias = bias_of_far_keys(inputs, window)
    operands = Operands(inputs, leaving[..., None], far_bias)
    attended: Any = fused.attend(plan, Reach(window), operands)
    out, far = attended
    return in_given_order(tokens, out, key_mask), NearFieldState(
        typed_like(far, state.far), tokens.ring
    )


def step(
    state: NearFieldState,
    query: Float[Array, "*B H D"],
    key: Float[Array, "*B K D"],
    value: Float[Array, "*B K V"],
    plan: Plan,
    *,
    parameters: Parameters,
    log_decay: Float[Array, "*B K"] | Float[Array, "*#B K"] | None = None,
) -> tuple[Float[Array, "*B H V"], NearFieldState]:
    """Reads one token: the oldest of the window goes over to the far ones.

    Args:
      state: what came before.
      query: ``[*B, H, D]``.
      key: ``[*B, K, D]``.
      value: ``[*B, K, V]``.
      plan: its feature map, output, epsilon and precision are read.
      parameters: of its feature map.
      log_decay: ``[*B, K]`` or ``[K]``, see :func:`prefill`.

    Returns:
      Output ``[*B, H, V]`` in the promoted type of the inputs, and the new state.

    Raises:
      ValueError: for decays with a state that was made without.
    """
    batch_shape, dtype = query.shape[:-2], jnp.result_type(query, key, value)
    log_decay = _known_decay(state, log_decay, key)
    if log_decay is not None:
        log_decay = spread_decay(log_decay, key.shape[:-1], f"key {key.shape}")
        state = _decayed(state, log_decay)
    old = fold_state(state, batch_shape)
    query, key, value = (x.reshape(-1, *x.shape[-2:]).astype(dtype) for x in (query, key, value))
    window, length = old.near.key.shape[1], old.near.length
    rows, slot = jnp.arange(query.shape[0], dtype=jnp.int32), length % window
    far, far_state = step_parts(
        old.far,
        query,
        old.near.key[rows, slot],
        old.near.value[rows, slot],
        plan,
        parameters=parameters,
        visible=length >= window,
        key_bias=None if old.near.decayed is None else old.near.decayed[rows, slot],
    )
    ring = push(old.near, key, value)
    # Slots fill in order: until all are in use, those behind the new token are empty.
    last = jnp.minimum(length, window - 1)[:, None]
    choices = Choices(block=1, back=0, ahead=0, causal=True, precision=plan.precision)
    bias = None
    if ring.decayed is not None:
        groups = query.shape[1] // key.shape[1]
        bias = jnp.repeat(jnp.swapaxes(ring.decayed, 1, 2), groups, axis=1)[:, :, None]
    sight = Sight(jnp.zeros_like(last), last, bias=bias)
    tile = Tile(query[:, None], ring.key.astype(dtype), ring.value.astype(dtype), sight)
    out, logsumexp = jax.vmap(lambda tile: attend_tile(tile, jnp.zeros(1, jnp.int32), choices))(
        tile
    )
    near = parts_of_softmax(out[:, 0], logsumexp[:, 0])
    out = finish(merge_parts(near, settled(far)), plan.output, plan.epsilon).astype(dtype)
    new = NearFieldState(far_state, ring)
    return out.reshape(*batch_shape, *out.shape[1:]), unfold_state(new, batch_shape)


def _known_decay(state: NearFieldState, log_decay: Array | None, key: Array) -> Array | None:
    """Returns the decay to use: zeros if the state was made with decay and none is given.

    Raises:
      ValueError: for decays with a state that was made without.
    """
    if state.near.decayed is not None:
        return jnp.zeros(key.shape[-2], key.dtype) if log_decay is None else log_decay
    if log_decay is not None:
        raise ValueError(
            "log_decay needs a state that remembers how its near keys have decayed, got one "
            "without: make it with init_state(..., decays=True), or leave log_decay out."
        )
    return None


def _decayed(state: NearFieldState, log_decay: Array) -> NearFieldState:
    """Decays all keys by ``[*B, K]``."""
    assert state.near.decayed is not None
    until = state.near.decayed + log_decay[..., None, :].astype(state.near.decayed.dtype)
    return NearFieldState(decayed(state.far, log_decay), state.near._replace(decayed=until))
