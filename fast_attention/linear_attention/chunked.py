"""Linear attention in chunks on XLA: one ``lax.scan``, features made and used chunk by chunk.

The forward pass carries the state; the backward pass recomputes each chunk from the inputs and the
state saved at its start, in a reverse scan. No array of length T holds features, and no prefix is
ever rebuilt by subtraction.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, G = H / K, D head width,
V value width, M features, C chunk.

Reference: arXiv:2009.14794, section 2.5 (the prefix sums); the chunked form is that of Hua et al.,
"Transformer Quality in Linear Time", arXiv:2202.10447, section 3.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear_attention.chunk_backward import pull_back_absorbed, pull_back_causal
from fast_attention.linear_attention.chunk_causal import read_causal, read_causal_again
from fast_attention.linear_attention.chunk_state import absorb_keys, next_state, read_state
from fast_attention.linear_attention.gradients import (
    add_key_gradient,
    add_query_gradient,
    as_cotangent,
    zero_gradients,
)
from fast_attention.linear_attention.inputs import (
    Inputs,
    Parts,
    Plan,
    finish,
    inverse_slope,
    safe_inverse,
)
from fast_attention.linear_attention.loops import scan_chunks, scan_chunks_back
from fast_attention.linear_attention.slices import (
    causal_sight,
    compute_dtype,
    key_features,
    load_rows,
    query_features,
    store,
    unload_rows,
)
from fast_attention.linear_attention.state import LinearAttentionState

# Measured on one CPU core (H=8, D=64, M=256): shorter chunks pay for the loop and the state,
# longer ones for the quadratic part and the cache.
CAUSAL_CHUNK = 64
BIDIRECTIONAL_CHUNK = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key.

    Args:
      plan: static choices.
      inputs: arrays, see :class:`Inputs`.

    Returns:
      ``[B, T, H, V]`` in the computing type, or :class:`Parts` if asked for, and the state.
    """
    forward = _causal_forward if plan.causal else _bidirectional_forward
    return forward(plan, inputs, save=False)[0]


def _forward(plan: Plan, inputs: Inputs) -> tuple[tuple[Any, LinearAttentionState], Any]:
    forward = _causal_forward if plan.causal else _bidirectional_forward
    return forward(plan, inputs, save=True)


def _backward(plan: Plan, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    backward = _causal_backward if plan.causal else _bidirectional_backward
    return (backward(plan, residuals, cotangents),)


attend.defvjp(_forward, _backward)


# Causal.


def _causal_forward(plan: Plan, inputs: Inputs, *, save: bool):
    length = inputs.query.shape[1]
    size = min(plan.chunk_size or CAUSAL_CHUNK, length)

    def body(carry, start, size):
        state, out = carry
        queries, _ = query_features(plan, inputs, start, size)
        keys, value, _ = key_features(plan, inputs, start, size)
        sight = causal_sight(inputs, start, size)
        read = read_causal(state, queries, keys, value, sight, plan.precision)
        first = read.kept.first
        parts = Parts(read.numerator, read.kept.denominator, read.log_scale)
        out = _write_output(plan, out, parts, start)
        absorbed = absorb_keys(first, keys, sight.enter, sight.keep)
        after = next_state(first, absorbed, value, plan.precision)
        return (after, out), ((read.kept, absorbed.log_scale) if save else None)

    (state, out), saved = scan_chunks(
        body, (inputs.state, _empty_output(plan, inputs)), length, size, plan.unroll
    )
    return (out, state), (inputs, out, saved)


def _causal_backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    inputs, out, saved = residuals
    d_out, d_state = cotangents
    length = inputs.query.shape[1]
    size = min(plan.chunk_size or CAUSAL_CHUNK, length)

    def body(carry, start, size, saved):
        kept, log_scale = saved
        d_kv, d_k_sum, grads = carry
        queries, pull_queries = query_features(plan, inputs, start, size)
        keys, value, pull_keys = key_features(plan, inputs, start, size)
        sight = causal_sight(inputs, start, size)
        read = read_causal_again(kept, queries, keys, value, sight, plan.precision)
        d_numerator, d_denominator = _parts_gradient(
            plan, inputs, kept.denominator, read.log_scale, out, d_out, start, size
        )
        chunk = pull_back_causal(
            queries,
            keys,
            value,
            read,
            absorb_keys(kept.first, keys, sight.enter, sight.keep, log_scale),
            d_numerator,
            d_denominator,
            d_kv,
            d_k_sum,
            sight.enter,
            plan.precision,
        )
        grads = add_query_gradient(grads, pull_queries(chunk.queries), start)
        grads = add_key_gradient(grads, pull_keys(chunk.keys, chunk.value), start)
        return chunk.kv, chunk.k_sum, grads

    carry = (d_state.kv, d_state.k_sum, zero_gradients(inputs))
    d_kv, d_k_sum, grads = scan_chunks_back(body, carry, saved, length, size, plan.unroll)
    return as_cotangent(inputs, grads, LinearAttentionState(d_kv, d_k_sum, None))


# Bidirectional.


def _bidirectional_forward(plan: Plan, inputs: Inputs, *, save: bool):
    del save  # The final state is all the backward pass needs.
    chunk = plan.chunk_size or BIDIRECTIONAL_CHUNK
    keys_length, queries_length = inputs.key.shape[1], inputs.query.shape[1]

    def absorb(state, start, size):
        keys, value, _ = key_features(plan, inputs, start, size)
        return next_state(state, absorb_keys(state, keys), value, plan.precision), None

    state, _ = scan_chunks(absorb, inputs.state, keys_length, min(chunk, keys_length), plan.unroll)

    def read(out, start, size):
        queries, _ = query_features(plan, inputs, start, size)
        return _write_output(plan, out, _read_parts(plan, state, queries), start), None

    out, _ = scan_chunks(
        read,
        _empty_output(plan, inputs),
        queries_length,
        min(chunk, queries_length),
        plan.unroll,
    )
    return (out, state), (inputs, out, state)


def _read_parts(plan: Plan, state: LinearAttentionState, queries: Features) -> Parts:
    read = read_state(state.log_scale, queries)
    numerator = jnp.einsum("bkrm,bkvm->bkrv", read.features, state.kv, precision=plan.precision)
    denominator = jnp.einsum("bkrm,bkm->bkr", read.features, state.k_sum, precision=plan.precision)
    return Parts(numerator, denominator, read.row_max)


def _bidirectional_backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    inputs, out, state = residuals
    d_out, d_state = cotangents
    chunk = plan.chunk_size or BIDIRECTIONAL_CHUNK
    keys_length, queries_length = inputs.key.shape[1], inputs.query.shape[1]

    def read(carry, start, size, _):
        d_kv, d_k_sum, grads = carry
        queries, pull_queries = query_features(plan, inputs, start, size)
        read = read_state(state.log_scale, queries)
        denominator = jnp.einsum(
            "bkrm,bkm->bkr", read.features, state.k_sum, precision=plan.precision
        )
        d_numerator, d_denominator = _parts_gradient(
            plan, inputs, denominator, read.row_max, out, d_out, start, size
        )
        d_features = jnp.einsum("bkrv,bkvm->bkrm", d_numerator, state.kv, precision=plan.precision)
        d_features = d_features + d_denominator[..., None] * state.k_sum[..., None, :]
        d_queries = queries.pull_back(read.shift, read.features, d_features)
        d_kv = d_kv + jnp.einsum(
            "bkrv,bkrm->bkvm", d_numerator, read.features, precision=plan.precision
        )
        d_k_sum = d_k_sum + jnp.einsum(
            "bkr,bkrm->bkm", d_denominator, read.features, precision=plan.precision
        )
        return d_kv, d_k_sum, add_query_gradient(grads, pull_queries(d_queries), start)

    carry = (d_state.kv, d_state.k_sum, zero_gradients(inputs))
    d_kv, d_k_sum, grads = scan_chunks_back(
        read, carry, (None, None), queries_length, min(chunk, queries_length), plan.unroll
    )

    def absorb(grads, start, size, _):
        keys, value, pull_keys = key_features(plan, inputs, start, size)
        # The scale of the final state is an upper bound for every key: nothing overflows.
        absorbed = absorb_keys(state, keys)
        d_keys, d_value = pull_back_absorbed(absorbed, value, d_kv, d_k_sum, plan.precision)
        return add_key_gradient(grads, pull_keys(d_keys, d_value), start)

    grads = scan_chunks_back(
        absorb, grads, (None, None), keys_length, min(chunk, keys_length), plan.unroll
    )
    if state.log_scale is not None:
        decay = jnp.exp(inputs.state.log_scale - state.log_scale)
        d_kv, d_k_sum = d_kv * decay[..., None, :], d_k_sum * decay
    return as_cotangent(inputs, grads, LinearAttentionState(d_kv, d_k_sum, None))


def _empty_output(plan: Plan, inputs: Inputs) -> Any:
    shape = (*inputs.query.shape[:3], inputs.value.shape[-1])
    dtype = compute_dtype(inputs)
    if plan.output != "parts":
        return jnp.zeros(shape, jnp.result_type(inputs.query, inputs.key, inputs.value))
    row = jnp.zeros(shape[:3], dtype)
    scale = None if plan.feature_map.log_kind == "none" else row
    return Parts(jnp.zeros(shape, dtype), row, scale)


def _write_output(plan: Plan, out: Any, parts: Parts, start: Array | int) -> Any:
    size = parts.denominator.shape[-1]
    if plan.output != "parts":
        chunk = finish(parts, plan.output, plan.epsilon)
        groups = out.shape[2] // chunk.shape[1]
        return store(out, unload_rows(chunk, size // groups), start)
    groups = out.numerator.shape[2] // parts.numerator.shape[1]
    return jax.tree.map(
        lambda buffer, rows: store(buffer, unload_rows(rows, size // groups), start), out, parts
    )


def _parts_gradient(
    plan: Plan,
    inputs: Inputs,
    denominator: Array,
    log_scale: Array | None,
    out: Any,
    d_out: Any,
    start: Array | int,
    size: int,
) -> tuple[Array, Array]:
    """Returns the cotangents of a chunk's numerator and denominator."""
    load = functools.partial(load_rows, inputs, start=start, size=size, dtype=compute_dtype(inputs))
    if plan.output == "parts":
        return load(d_out.numerator), load(d_out.denominator)
    d_rows = load(d_out)
    if plan.output == "sum":
        if log_scale is not None:
            d_rows = d_rows * jnp.exp(log_scale)[..., None]
        return d_rows, jnp.zeros_like(denominator)
    inverse = safe_inverse(denominator, plan.epsilon)
    slope = inverse_slope(denominator, plan.epsilon)
    return d_rows * inverse[..., None], jnp.einsum("bkrv,bkrv->bkr", d_rows, load(out)) * slope
