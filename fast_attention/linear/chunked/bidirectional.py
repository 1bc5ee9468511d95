"""Bidirectional linear attention in chunks: all keys into one state, which every query reads.

Shape letters: B batch, T queries, S keys, C chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal_chunk_backward import pull_back_absorbed
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.chunked.chunk_state import absorb_keys, next_state, read_state
from fast_attention.linear.chunked.gradient_buffers import (
    add_key_gradient,
    add_query_gradient,
    as_cotangent,
    gradient_buffers,
)
from fast_attention.linear.chunked.loops import scan_chunks, scan_chunks_back
from fast_attention.linear.chunked.output_buffers import (
    empty_output,
    parts_gradient,
    write_output,
)
from fast_attention.linear.chunked.slices import key_features, query_features
from fast_attention.linear.rounded_products import einsum_of, sums
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import smaller
from fast_attention.linear.types import Inputs, Parts, Plan


class _Kept(NamedTuple):
    """What the backward pass keeps of the rows of a chunk, ``[B, K, R]``."""

    denominator: Array
    row_max: Array | None


def forward(plan: Plan, inputs: Inputs, *, save: bool):
    """Returns output and final state, and what :func:`backward` needs if ``save``."""
    chunk, unroll = planned_chunk(plan, inputs)
    keys_length, queries_length = inputs.key.shape[1], inputs.query.shape[1]
    einsum = einsum_of(plan, inputs)

    def absorb(state, start, size):
        keys, value, _ = key_features(plan, inputs, start, size)
        return next_state(state, absorb_keys(state, keys), value, einsum), None

    state, _ = scan_chunks(absorb, inputs.state, keys_length, smaller(chunk, keys_length), unroll)

    def read(out, start, size):
        queries, _ = query_features(plan, inputs, start, size)
        read = read_state(state.log_scale, queries)
        numerator = einsum("bkrm,bkvm->bkrv", read.features, state.kv)
        denominator = sums("bkrm,bkm->bkr", read.features, state.k_sum)
        out = write_output(plan, out, Parts(numerator, denominator, read.row_max), start)
        return out, (_Kept(denominator, read.row_max) if save else None)

    out, kept = scan_chunks(
        read,
        empty_output(plan, inputs),
        queries_length,
        smaller(chunk, queries_length),
        unroll,
    )
    return (out, state), (inputs, out, state, kept)


def backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    """Returns the gradient of every float array in ``inputs``.

    Args:
      plan: static choices.
      residuals: of :func:`forward`; what was kept of rows may be ``(None, None)``, to be computed
        again.
      cotangents: of its results.
    """
    inputs, out, state, kept = residuals
    d_out, d_state = cotangents
    chunk, unroll = planned_chunk(plan, inputs)
    keys_length, queries_length = inputs.key.shape[1], inputs.query.shape[1]
    einsum = einsum_of(plan, inputs)
    buffers, outputs_in = gradient_buffers(plan, inputs, out, d_out)

    def read(carry, start, size, kept):
        d_kv, d_k_sum, grads = carry
        queries, pull_queries = query_features(plan, inputs, start, size)
        if kept is None:
            read = read_state(state.log_scale, queries)
            denominator = sums("bkrm,bkm->bkr", read.features, state.k_sum)
        else:
            read = read_state(state.log_scale, queries, kept.row_max)
            denominator = kept.denominator
        d_numerator, d_denominator = parts_gradient(
            plan, inputs, denominator, read.row_max, *outputs_in(grads), start, size
        )
        # Numerator and denominator nearly cancel here: rounding one of them would show.
        d_features = einsum("bkrv,bkvm->bkrm", d_numerator, state.kv, rounded=False)
        d_features = d_features + d_denominator[..., None] * state.k_sum[..., None, :]
        d_queries = queries.pull_back(read.shift, read.features, d_features)
        d_kv = d_kv + einsum("bkrv,bkrm->bkvm", d_numerator, read.features)
        d_k_sum = d_k_sum + sums("bkr,bkrm->bkm", d_denominator, read.features)
        return d_kv, d_k_sum, add_query_gradient(grads, pull_queries(d_queries), start)

    carry = (d_state.kv, d_state.k_sum, buffers)
    d_kv, d_k_sum, grads = scan_chunks_back(
        read, carry, kept, queries_length, smaller(chunk, queries_length), unroll
    )

    def absorb(grads, start, size, _):
        keys, value, pull_keys = key_features(plan, inputs, start, size)
        # The scale of the final state is an upper bound for every key: nothing overflows.
        absorbed = absorb_keys(state, keys, log_scale=state.log_scale)
        d_keys, d_value = pull_back_absorbed(absorbed, value, d_kv, d_k_sum, einsum)
        return add_key_gradient(grads, pull_keys(d_keys, d_value), start)

    grads = scan_chunks_back(
        absorb, grads, (None, None), keys_length, smaller(chunk, keys_length), unroll
    )
    if state.log_scale is not None:
        decay = jnp.exp(inputs.state.log_scale - state.log_scale)
        d_kv, d_k_sum = d_kv * decay[..., None, :], d_k_sum * decay
    return as_cotangent(inputs, grads, LinearAttentionState(d_kv, d_k_sum, None))
