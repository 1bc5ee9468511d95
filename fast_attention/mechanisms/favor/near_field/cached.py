"""One query over a cache of keys: exact near the last visible key, features for the others.

Shape letters: B batch, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.base import Parameters
from fast_attention.linear.api import linear_attention
from fast_attention.linear.prepare import prepare
from fast_attention.linear.types import Plan, finish, merge_parts
from fast_attention.mechanisms.favor.near_field.near_and_far import (
    parts_of_softmax,
    settled,
)


def attend_from_one(
    query: Float[Array, "*B 1 H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    plan: Plan,
    *,
    reach: int,
    parameters: Parameters,
    key_mask: Array | None = None,
    key_bias: Array | None = None,
) -> Float[Array, "*B 1 H V"]:
    """Attends from one query, which stands at the last key that is not masked.

    This is how ``nnx.MultiHeadAttention(decode=True)`` calls attention functions. It reads all
    keys; ``step`` of a state takes constant time.

    Args:
      query: ``[*B, 1, H, D]``.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      plan: of the other keys.
      reach: keys at most so many positions before the last visible one are attended to exactly.
      parameters: of the feature map.
      key_mask: ``[*B, S]`` or ``[*B, S, K]``.
      key_bias: likewise; multiplies the weights of a key by ``exp(bias)``.

    Returns:
      ``[*B, 1, H, V]`` in the type of the inputs.
    """
    output = plan.output
    plan = dataclasses.replace(plan, causal=False, output="parts", complete=True)
    plan, inputs = prepare(
        plan, query, key, value, parameters=parameters, key_mask=key_mask, key_bias=key_bias
    )
    visible = inputs.key_mask
    if visible is None:
        visible = jnp.ones((*inputs.key.shape[:2], 1), bool)
    place = jnp.arange(inputs.key.shape[1], dtype=jnp.int32)[None, :, None]
    last = jnp.where(visible, place, -1).max(axis=1, keepdims=True)
    near = visible & (place >= last - reach)
    logits = _logits(inputs.query, inputs.key, inputs.key_bias, near, plan.precision)
    weights, total = _softmax(logits)
    shown = jnp.where(visible[..., None], inputs.value, 0).astype(weights.dtype)
    mean = jnp.einsum("bkgs,bskv->bkgv", weights, shown, precision=plan.precision)
    heads = (len(mean), 1, inputs.query.shape[2])
    exact = parts_of_softmax(mean.reshape(*heads, -1), total.reshape(heads))
    far: Any = linear_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        plan,
        parameters=parameters,
        key_mask=visible & ~near,
        key_bias=inputs.key_bias,
    )
    out = finish(merge_parts(exact, settled(far)), output, plan.epsilon)
    return out.astype(inputs.query.dtype).reshape(*query.shape[:-1], value.shape[-1])


def _logits(query: Array, key: Array, bias: Array | None, seen: Array, precision: Any) -> Array:
    """Logits ``[B, K, G, S]`` of the one query of each row, -inf where a key is not seen."""
    query, key = (x.astype(at_least_float32(x.dtype)) for x in (query, key))
    key = jnp.where(seen[..., None], key, 0)
    grouped = query.reshape(len(query), key.shape[2], -1, query.shape[-1])
    logits = jnp.einsum("bkgd,bskd->bkgs", grouped, key, precision=precision)
    logits = logits * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + jnp.swapaxes(bias, 1, 2)[:, :, None].astype(logits.dtype)
    return jnp.where(jnp.swapaxes(seen, 1, 2)[:, :, None], logits, -jnp.inf)


def _softmax(logits: Array) -> tuple[Array, Array]:
    """Softmax over the last axis, zeros where nothing is seen, and its logsumexp."""
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(largest == -jnp.inf, 0, largest))
    total = weights.sum(axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    logsumexp = jnp.where(total > 0, jnp.log(safe) + largest, -jnp.inf)
    return weights / safe, jnp.squeeze(logsumexp, -1)
