"""Linear attention by definition, to check everything else against: slow, short and plain."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear.state import (
    EMPTY_LOG_SCALE,
    LinearAttentionState,
    key_features,
    merge,
)
from fast_attention.linear.types import Inputs, Parts, Plan, finish


def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Quadratic attention: every weight ``phi(q_t) . phi(k_s)`` written out, ``O(T S M)`` memory.

    The state before the call, if any, is read as one more block of keys.
    """
    groups = inputs.query.shape[2] // inputs.key.shape[2]
    heads_first = lambda x: jnp.swapaxes(x, 1, 2).astype(inputs.state.kv.dtype)  # noqa: E731
    inputs = _without_padding(inputs)
    value = jnp.repeat(heads_first(inputs.value), groups, axis=1)
    queries = plan.feature_map.apply(
        heads_first(inputs.query).reshape(
            inputs.query.shape[0], inputs.key.shape[2], -1, inputs.query.shape[-1]
        ),
        inputs.parameters,
        is_query=True,
        exact_scale=plan.exact_scale,
    )
    queries = jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, inputs.query.shape[1], x.shape[-1]), queries
    )
    keys = _keys(plan, inputs)
    keys = jax.tree.map(lambda x: jnp.repeat(x, groups, axis=1), keys)
    visible = _visible(plan, inputs)[:, None]
    state = jax.tree.map(lambda x: jnp.repeat(x, groups, axis=1), inputs.state)
    reads_state = jnp.ones(inputs.query.shape[:2], bool)
    if inputs.segment_ids is not None:
        reads_state = inputs.segment_ids == inputs.segment_ids[:, :1]
    reads_state = reads_state[:, None]

    log = None
    if queries.log is None or keys.log is None:
        signs = jnp.einsum("bhtm,bhsm->bhts", queries.shift(None), keys.shift(None))
        weights = jnp.where(visible, signs, 0)
        past = jnp.where(reads_state[..., None], queries.shift(None), 0)
    else:
        # [B, H, T, S, N]: the logarithm of every single product of features.
        logs = queries.log[:, :, :, None, :] + keys.log[:, :, None, :, :]
        logs = jnp.where(visible[..., None], logs, -jnp.inf)
        past_logs = queries.log + state.log_scale[..., None, :]
        past_logs = jnp.where(reads_state[..., None], past_logs, EMPTY_LOG_SCALE)
        log = jnp.maximum(logs.max((-1, -2)), past_logs.max(-1))
        log = jax.lax.stop_gradient(log)
        products = jnp.exp(logs - log[..., None, None])
        if queries.values is not None and keys.values is not None:
            products = products * queries.values[..., None, :] * keys.values[..., None, :, :]
        weights = products.sum(-1)
        past = Features(queries.values, past_logs).shift(-log[..., None])
        past = jnp.where(reads_state[..., None], past, 0)
    numerator = weights @ value + jnp.einsum("bhtm,bhvm->bhtv", past, state.kv)
    denominator = weights.sum(-1) + jnp.einsum("bhtm,bhm->bht", past, state.k_sum)
    parts = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), Parts(numerator, denominator, log))
    final = _final_state(plan, inputs)
    if plan.output == "parts":
        return parts, final
    out_dtype = jnp.result_type(inputs.query, inputs.key, inputs.value)
    return finish(parts, plan.output, plan.epsilon).astype(out_dtype), final


def _without_padding(inputs: Inputs) -> Inputs:
    if inputs.key_mask is None:
        return inputs
    visible = inputs.key_mask[..., None]
    return inputs._replace(
        key=jnp.where(visible, inputs.key, 0), value=jnp.where(visible, inputs.value, 0)
    )


def _keys(plan: Plan, inputs: Inputs) -> Features:
    heads_first = lambda x: None if x is None else jnp.swapaxes(x, 1, 2)  # noqa: E731
    bias = heads_first(inputs.key_bias)
    return key_features(
        plan.feature_map,
        inputs.parameters,
        jnp.swapaxes(inputs.key, 1, 2).astype(inputs.state.kv.dtype),
        key_mask=heads_first(inputs.key_mask),
        key_bias=None if bias is None else bias.astype(inputs.state.kv.dtype),
        exact_scale=plan.exact_scale,
    )


def _visible(plan: Plan, inputs: Inputs) -> Array:
    length, keys = inputs.query.shape[1], inputs.key.shape[1]
    visible = jnp.ones((1, length, keys), bool)
    if plan.causal:
        visible = jnp.tril(visible)
    if inputs.segment_ids is not None:
        ids = inputs.segment_ids
        visible = visible & (ids[:, :, None] == ids[:, None, :])
    return visible


def _final_state(plan: Plan, inputs: Inputs) -> LinearAttentionState:
    keys, value = _keys(plan, inputs), jnp.swapaxes(inputs.value, 1, 2)
    before = inputs.state
    if inputs.segment_ids is not None:
        ids = inputs.segment_ids
        last = (ids == ids[:, -1:])[:, None, :, None]
        keys = jax.tree.map(lambda x: x, keys)
        value = jnp.where(last, value, 0)
        if keys.log is None:
            keys = Features(jnp.where(last, keys.values, 0), None)
        else:
            keys = Features(keys.values, jnp.where(last, keys.log, -jnp.inf))
        keeps = (ids[:, 0] == ids[:, -1])[:, None, None]
        before = LinearAttentionState(
            jnp.where(keeps[..., None], before.kv, 0),
            jnp.where(keeps, before.k_sum, 0),
            None
            if before.log_scale is None
            else jnp.where(keeps, before.log_scale, EMPTY_LOG_SCALE),
        )
    if keys.log is None:
        features, scale = keys.shift(None), None
    else:
        scale = jax.lax.stop_gradient(jnp.maximum(keys.log.max(-2), EMPTY_LOG_SCALE))
        features = keys.shift(-scale[..., None, :])
    seen = LinearAttentionState(
        jnp.einsum("bksv,bksm->bkvm", value.astype(features.dtype), features),
        features.sum(-2),
        scale,
    )
    return merge(before, seen)
