"""Decoding with linear attention: read a prompt once, then one token at a time.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.bundles import bundle_of
from fast_attention.arrays.dtypes import widest
from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.feature_maps.base import Parameters
from fast_attention.linear.api import linear_attention
from fast_attention.linear.chunked.chunk_state import absorb_keys, next_state, read_state
from fast_attention.linear.chunked.reductions import row_sum
from fast_attention.linear.decay import spread_decay
from fast_attention.linear.state import LinearAttentionState, decayed, key_features
from fast_attention.linear.types import Parts, Plan, finish
from fast_attention.linear.wrapped_maps import match_scales


def prefill(
    state: LinearAttentionState,
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    plan: Plan | None = None,
    *,
    parameters: Parameters,
    key_mask: Bool[Array, "*B T"] | None = None,
    log_decay: Float[Array, "*B T K"] | Float[Array, "*#B K"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "*B T H V"], LinearAttentionState]:
    """Reads T tokens causally, after the tokens of ``state``.

    Args:
      state: the state of earlier tokens, as from :func:`~fast_attention.linear.empty_state`.
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      plan: the feature map, and how to compute the call; None takes its fields from `options`.
      parameters: of the feature map.
      key_mask: ``[*B, T]``; False is padding on either side of a shorter prompt.
      log_decay: ``[*B, T, K]`` or ``[K]``, see :func:`~fast_attention.linear_attention`.
      **options: fields of :class:`~fast_attention.Plan`, such as ``feature_map=...``.

    Returns:
      Outputs ``[*B, T, H, V]`` (unspecified at padding) and the state after the prompt.
    """
    plan = bundle_of(Plan, "plan", plan, options)
    return linear_attention(
        query,
        key,
        value,
        dataclasses.replace(plan, causal=True),
        parameters=parameters,
        key_mask=key_mask,
        initial_state=state,
        log_decay=log_decay,
        return_state=True,
    )


def step(
    state: LinearAttentionState,
    query: Float[Array, "*B H D"],
    key: Float[Array, "*B K D"],
    value: Float[Array, "*B K V"],
    plan: Plan | None = None,
    *,
    parameters: Parameters,
    log_decay: Float[Array, "*B K"] | Float[Array, "*#B K"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "*B H V"], LinearAttentionState]:
    """Adds one token to the state and reads it, in constant time and memory.

    Args:
      state: what came before.
      query: ``[*B, H, D]``.
      key: ``[*B, K, D]``.
      value: ``[*B, K, V]``.
      plan: its feature map, output, epsilon and precision are read; None takes them from
        `options`.
      parameters: of the feature map.
      log_decay: ``[*B, K]`` or ``[K]``: the state is first multiplied by its exponential.
      **options: fields of :class:`~fast_attention.Plan`, such as ``feature_map=...``.

    Returns:
      Output ``[*B, H, V]`` in the promoted type of the inputs, and the new state.
    """
    plan = bundle_of(Plan, "plan", plan, options)
    if log_decay is not None:
        state = decayed(state, spread_decay(log_decay, key.shape[:-1], f"key {key.shape}"))
    parts, new = step_parts(state, query, key, value, plan, parameters=parameters)
    out = finish(parts, plan.output, plan.epsilon)
    return out.astype(jnp.result_type(query, key, value)), new


def step_parts(
    state: LinearAttentionState,
    query: Float[Array, "*B H D"],
    key: Float[Array, "*B K D"],
    value: Float[Array, "*B K V"],
    plan: Plan,
    *,
    parameters: Parameters,
    visible: Bool[Array, "*B"] | None = None,
    key_bias: Float[Array, "*B K"] | None = None,
) -> tuple[Parts, LinearAttentionState]:
    """A step without the division, for merging with attention to other keys.

    Args:
      state: what came before.
      query: ``[*B, H, D]``.
      key: ``[*B, K, D]``.
      value: ``[*B, K, V]``.
      plan: its feature map and precision are read.
      parameters: of the feature map.
      visible: ``[*B]``; a key where it is False is not added to the state.
      key_bias: ``[*B, K]``; a factor ``exp(bias)`` on the weights of the key.

    Returns:
      :class:`~.types.Parts` of ``[*B, H]``, and the new state.
    """
    batch_shape, (heads, width), kv_heads = query.shape[:-2], query.shape[-2:], key.shape[-2]
    batch = math.prod(batch_shape)
    dtype = widest(jnp.float32, state.kv.dtype, query.dtype, key.dtype, value.dtype)
    feature_map, matched = match_scales(plan.feature_map, state)
    old = jax.tree.map(
        lambda x: x.astype(dtype).reshape(batch, *x.shape[len(batch_shape) :]), matched
    )
    keys = key_features(
        feature_map,
        parameters,
        key.astype(dtype).reshape(batch, kv_heads, 1, width),
        key_mask=None if visible is None else visible.reshape(batch, 1, 1),
        key_bias=None if key_bias is None else key_bias.astype(dtype).reshape(batch, kv_heads, 1),
        exact_scale=True,
    )
    # Rows of one key head are its group of query heads.
    queries = feature_map.apply(
        query.astype(dtype).reshape(batch, kv_heads, heads // kv_heads, width),
        parameters,
        is_query=True,
        exact_scale=True,
    )
    values = value.astype(dtype).reshape(batch, kv_heads, 1, value.shape[-1])
    einsum = functools.partial(jnp.einsum, precision=plan.precision)
    new = next_state(old, absorb_keys(old, keys), values, einsum)
    read = read_state(new.log_scale, queries)
    numerator = einsum("bkrm,bkvm->bkrv", read.features, new.kv)
    denominator = row_sum(read.features * new.k_sum[..., None, :])
    parts = Parts(numerator, denominator, read.row_max)
    parts = jax.tree.map(lambda x: x.reshape(*batch_shape, heads, *x.shape[3:]), parts)
    new = jax.tree.map(lambda x: x.astype(state.kv.dtype).reshape(*batch_shape, *x.shape[1:]), new)
    return parts, new
