"""What the backward passes of both directions share: cotangents of rows, features and states.

Scales and maxima cancel in the result and are constants for derivatives. Numerator and denominator
of a row nearly cancel in the gradient of its features: there states are multiplied in two bfloat16
parts, and what belongs to denominators is kept to 16 bits or more.

Letters are those of :mod:`.chunk`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.gradient_buffers import as_cotangent
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.time_minor_chunks.chunk import (
    Call,
    Keys,
    Operand,
    beside_groups,
    buffer,
    heads_last,
    in_groups,
    load,
    operand,
    query_features_of,
    store,
)
from fast_attention.linear.time_minor_chunks.features import both_parts, rounded
from fast_attention.linear.types import Inputs, Plan, inverse_slope, safe_inverse


class Gradients(NamedTuple):
    """Gradients of the inputs, filled chunk by chunk.

    Attributes:
      query: the array of an :class:`Operand`.
      key: the same.
      value: the same.
      key_bias: ``[B, K or 1, S]``, or None.
      weights: of :class:`.features.FeatureFunctions`, in units of :attr:`FeatureFunctions.unit`.
    """

    query: Array
    key: Array
    value: Array
    key_bias: Array | None
    weights: Any


class Outputs(NamedTuple):
    """Outputs and their cotangents."""

    out: Operand
    d_out: Operand


class StateCotangent(NamedTuple):
    """The cotangent of a state on some scale.

    Attributes:
      kv: of the sums of values, ``[B, K, V, M]``, float32.
      k_sum: of the sums of features, ``[B, K, M]``.
    """

    kv: Array
    k_sum: Array

    def times(self, factor: Array) -> StateCotangent:
        """Returns it multiplied by a factor ``[B, K, M]``."""
        return StateCotangent(self.kv * factor[:, :, None], self.k_sum * factor)


class Rows(NamedTuple):
    """The cotangents of the rows of a chunk.

    Attributes:
      numerator: ``[B, K, G, V, C]``, the operand of products.
      denominator: ``[B, K, G, C]``, float32.
    """

    numerator: Array
    denominator: Array


Pull = Callable[[Array], tuple[Any, ...]]


def outputs_of(out: Array, d_out: Array) -> Outputs:
    """Returns outputs in the layout of this package."""
    return Outputs(operand(out), operand(d_out))


def empty_gradients(call: Call, outputs: Outputs) -> Gradients:
    """Returns buffers, and 0 for weights.

    Where shapes and types agree, gradients of queries are written over outputs, chunk by chunk.
    """
    over = _overwritten(call, outputs)

    def empty(x: Array) -> Array:
        return buffer(x.shape, x.dtype)

    return Gradients(
        query=outputs.out.array if over else empty(call.query.array),
        key=empty(call.key.array),
        value=empty(call.value.array),
        key_bias=None if call.key_bias is None else empty(call.key_bias),
        weights=jax.tree.map(jnp.zeros_like, call.features.weights),
    )


def outputs_in(call: Call, outputs: Outputs, grads: Gradients) -> Outputs:
    """Returns outputs, where they are not overwritten yet."""
    if not _overwritten(call, outputs):
        return outputs
    return outputs._replace(out=outputs.out._replace(array=grads.query))


def _overwritten(call: Call, outputs: Outputs) -> bool:
    old, new = outputs.out.array, call.query.array
    return old.shape == new.shape and old.dtype == new.dtype


def cotangents_of_rows(
    call: Call, plan: Plan, outputs: Outputs, denominator: Array, start: Array | int
) -> Rows:
    """Divides the cotangents of the outputs of a chunk.

    Args:
      call: the call.
      plan: static choices.
      outputs: of the call.
      denominator: of the chunk, ``[B, K, G, C]``.
      start: of the chunk.
    """
    size = denominator.shape[-1]
    out, d_out = (in_groups(call, load(x, start, size)).astype(jnp.float32) for x in outputs)
    numerator = d_out * safe_inverse(denominator, plan.epsilon)[..., None, :]
    if call.low:
        numerator = rounded(numerator)
    if plan.epsilon:
        d_denominator = jnp.sum(d_out * out, axis=-2) * inverse_slope(denominator, plan.epsilon)
    else:
        # Of the numerator as it is rounded, so that both cancel as they should.
        d_denominator = -jnp.sum(numerator * out, axis=-2)
    return Rows(call.stored(numerator), d_denominator)


def of_some_rows(call: Call, rows: Rows, chosen: Array) -> Rows:
    """Returns cotangents that are 0 except for the rows that are chosen, bool ``[B, K, C]``."""
    chosen = chosen if call.groups == 1 else chosen[:, :, None]
    return Rows(
        jnp.where(chosen[..., None, :], rows.numerator, 0),
        jnp.where(chosen, rows.denominator, 0),
    )


def pulled_queries(call: Call, query: Array, scale: Array | None) -> tuple[Array, Pull]:
    """Returns features of queries, and what pulls their cotangent back.

    Args:
      call: the call.
      query: ``[B, K, G, D, C]``.
      scale: of the state that they read.

    Returns:
      ``[B, K, G, C, M]``, and a function of their cotangent to the gradients of weights and
      queries.
    """
    x, pull = jax.vjp(
        call.features.pullable_queries, call.features.weights, query.astype(jnp.float32)
    )
    features = query_features_of(call, x, scale)
    return features, lambda cotangent: _pull(call, pull, features, cotangent)


def pulled_keys(
    call: Call, keys: Keys, scale: Array | None, kept: Array | None = None
) -> tuple[Array, Pull]:
    """Returns features of keys, and what pulls their cotangent back.

    Args:
      call: the call.
      keys: the chunk.
      scale: on which they enter the state.
      kept: bool ``[B, K, C]``, keys that count; features of others are 0. None for all.

    Returns:
      ``[B, K, C, M]``, and a function of their cotangent to the gradients of weights, keys and
      biases.
    """

    def apply(weights: Any, key: Array, bias: Array | None) -> Array:
        return call.features.pullable_keys(weights, key, bias, keys.seen)

    x, pull = jax.vjp(apply, call.features.weights, keys.key.astype(jnp.float32), keys.bias)
    if scale is not None:
        x = call.features.exp(x - scale[:, :, None])
    if kept is not None:
        x = jnp.where(kept[..., None], x, 0)
    features = call.stored(x)
    return features, lambda cotangent: _pull(call, pull, features, cotangent)


def _pull(call: Call, pull: Any, features: Array, cotangent: Array) -> tuple[Any, ...]:
    if call.features.exponential:
        # A feature that underflowed has no gradient, also where its cotangent overflowed.
        features = features.astype(jnp.float32)
        cotangent = jnp.where(features > 0, features * cotangent, 0)
    if not call.low:
        cotangent = call.stored(cotangent)
    weights, *inputs = pull(cotangent)
    # Weights are multiplied once, at the end.
    return weights, *(None if x is None else x / call.features.unit for x in inputs)


def read_gradient(call: Call, rows: Rows, state_rows: Array) -> Array:
    """Returns the cotangent of query features from the state they read, ``[B, K, G, C, M]``.

    Args:
      call: the call.
      rows: the chunk.
      state_rows: ``[B, K, V + 16, M]``.
    """
    value_dim = rows.numerator.shape[-2]
    result = call.product(
        "bkgvq,bkvm->bkgqm",
        _twice(call, rows.numerator),
        _both_parts(call, state_rows[:, :, :value_dim]),
    )
    sums = state_rows[:, :, value_dim : value_dim + 1]
    return result + rows.denominator[..., None] * beside_groups(sums, result)


def entered_gradient(call: Call, keys: Keys, d_state: StateCotangent) -> Array:
    """Returns the cotangent of key features from the state they enter, ``[B, K, C, M]``."""
    value_dim = d_state.kv.shape[-2]
    result = call.product(
        "bkvc,bkvm->bkcm",
        _twice(call, keys.value[:, :, :value_dim]),
        _both_parts(call, d_state.kv),
    )
    return result + d_state.k_sum[:, :, None]


def _both_parts(call: Call, x: Array) -> Array:
    """Returns ``[..., V, M]`` in two parts if products are low."""
    return both_parts(x) if call.low else x


def _twice(call: Call, x: Array) -> Array:
    """Returns what :func:`_both_parts` is multiplied with."""
    return jnp.concatenate([x, x], axis=-2) if call.low else x


def value_gradient(call: Call, key_features: Array, d_state: StateCotangent) -> Array:
    """Returns the gradient of values from the state they enter, ``[B, K, V, C]``."""
    return call.product("bkvm,bkcm->bkvc", d_state.kv, key_features)


def add_read(
    call: Call, d_state: StateCotangent, rows: Rows, query_features: Array
) -> StateCotangent:
    """Adds the cotangent of the state that rows read."""
    kv = call.product("bkgvq,bkgqm->bkvm", rows.numerator, query_features)
    # In float32: numerators and denominators nearly cancel.
    terms = rows.denominator[..., None] * query_features.astype(jnp.float32)
    k_sum = terms.sum(axis=-2 if call.groups == 1 else (-3, -2))
    return StateCotangent(d_state.kv + kv, d_state.k_sum + k_sum)


def add_query_gradient(
    call: Call, grads: Gradients, pulled: tuple[Any, ...], start: Array | int
) -> Gradients:
    """Stores gradients of weights and queries ``[B, K, G, D, C]``."""
    weights, d_query = pulled
    d_query = d_query.reshape(d_query.shape[0], -1, *d_query.shape[-2:])
    return grads._replace(
        query=store(call.query._replace(array=grads.query), d_query, start),
        weights=jax.tree.map(jnp.add, grads.weights, weights),
    )


def add_key_gradient(
    call: Call, grads: Gradients, pulled: tuple[Any, ...], d_value: Array, start: Array | int
) -> Gradients:
    """Stores gradients of weights, keys, biases and values."""
    weights, d_key, d_bias = pulled
    if d_bias is not None:
        assert grads.key_bias is not None
        d_bias = d_bias.astype(grads.key_bias.dtype)
        d_bias = lax.dynamic_update_slice_in_dim(grads.key_bias, d_bias, start, axis=-1)
    return grads._replace(
        key=store(call.key._replace(array=grads.key), d_key, start),
        value=store(call.value._replace(array=grads.value), d_value, start),
        key_bias=d_bias,
        weights=jax.tree.map(jnp.add, grads.weights, weights),
    )


def finished_gradients(
    call: Call, inputs: Inputs, grads: Gradients, d_state: StateCotangent, scale: Array | None
) -> Inputs:
    """Returns the gradient of every float array in the inputs.

    Args:
      call: the call.
      inputs: arrays.
      grads: of all chunks.
      d_state: cotangent of the state before the first key.
      scale: on which it is, or None.
    """
    _, pull = jax.vjp(call.features.weights_of, inputs.parameters)
    weights = jax.tree.map(lambda x: x / call.features.unit, grads.weights)
    if scale is not None:
        assert inputs.state.log_scale is not None
        before = inputs.state.log_scale * call.features.unit
        d_state = d_state.times(call.features.exp(before - scale))
    return as_cotangent(
        inputs,
        inputs._replace(
            query=heads_last(call.query._replace(array=grads.query)),
            key=heads_last(call.key._replace(array=grads.key)),
            value=heads_last(call.value._replace(array=grads.value)),
            parameters=pull(weights)[0],
            key_bias=None if grads.key_bias is None else jnp.swapaxes(grads.key_bias, 1, 2),
        ),
        LinearAttentionState(*d_state, None),
    )
