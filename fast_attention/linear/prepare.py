"""From the arguments of a call to what implementations receive: checks, one layout, an empty state.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32, widest
from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Parameters
from fast_attention.linear.checks import (
    broadcast_segments,
    check_shapes,
    check_state,
    per_key,
    promote_floating,
    split_bias,
)
from fast_attention.linear.decay import decay_of_tokens
from fast_attention.linear.state import LinearAttentionState, empty_state
from fast_attention.linear.types import Inputs, Plan
from fast_attention.linear.wrapped_maps import match_scales, with_position_scale


def prepare(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    *,
    parameters: Parameters,
    key_mask: Array | None = None,
    key_bias: Array | None = None,
    segment_ids: Array | None = None,
    initial_state: LinearAttentionState | None = None,
    log_decay: Array | None = None,
) -> tuple[Plan, Inputs]:
    """Checks what a plan asks for; see :func:`~.api.linear_attention` for the arguments.

    Returns:
      The plan with the map that the bias and the state need, and the arrays with one batch axis.
    """
    check_shapes(query, key, value, plan.causal, segment_ids)
    feature_map = plan.feature_map
    if key_bias is not None:
        feature_map = with_position_scale(feature_map)
    feature_map, initial_state = match_scales(feature_map, initial_state)

    batch_shape = query.shape[:-3]
    batch = math.prod(batch_shape)
    query, key, value = promote_floating(query, key, value)
    compute = at_least_float32(query.dtype)
    state = initial_state
    if state is not None:
        compute = widest(compute, state.kv.dtype)
    else:
        state = empty_state(
            feature_map,
            parameters,
            batch_shape,
            key.shape[-2],
            key.shape[-1],
            value.shape[-1],
            compute,
        )
    check_state(state, batch_shape, key, value)
    key_bias, key_mask = split_bias(
        per_key(key_bias, key, "key_bias"), per_key(key_mask, key, "key_mask")
    )
    inputs = Inputs(
        query=query.reshape(batch, *query.shape[-3:]),
        key=key.reshape(batch, *key.shape[-3:]),
        value=value.reshape(batch, *value.shape[-3:]),
        parameters=parameters,
        key_mask=key_mask,
        key_bias=key_bias,
        segment_ids=None if segment_ids is None else broadcast_segments(segment_ids, query),
        state=jax.tree.map(
            lambda x: x.astype(compute).reshape(batch, *x.shape[len(batch_shape) :]), state
        ),
        log_decay=decay_of_tokens(log_decay, key, key_mask, causal=plan.causal, dtype=compute),
    )
    return dataclasses.replace(plan, feature_map=feature_map), inputs


def fill_empty(inputs: Inputs) -> Inputs:
    """Gives an empty batch one row, and sequences without positions one, where a key is masked."""
    batch, queries = inputs.query.shape[:2]
    keys = inputs.key.shape[1]
    if 0 not in (batch, queries, keys):
        return inputs

    def filled(x: Array | None, axis: int = 1) -> Any:
        if x is None or x.shape[axis] != 0:
            return x
        return jnp.pad(x, [(0, int(i == axis)) for i in range(x.ndim)])

    mask = inputs.key_mask
    if keys == 0 and mask is None:
        mask = jnp.ones((batch, keys, 1), bool)
    inputs = inputs._replace(
        query=filled(inputs.query),
        key=filled(inputs.key),
        value=filled(inputs.value),
        key_mask=filled(mask),
        key_bias=filled(inputs.key_bias),
        segment_ids=filled(inputs.segment_ids),
        log_decay=filled(inputs.log_decay),
    )
    # Parameters may have an axis of the batch too.
    return (
        jax.tree.map(lambda x: filled(x, 0) if jnp.ndim(x) else x, inputs) if batch == 0 else inputs
    )
