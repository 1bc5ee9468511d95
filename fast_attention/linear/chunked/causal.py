"""Causal linear attention in chunks: the passes over the whole length, forward and backward.

The backward pass walks over the chunks from last to first, recomputes each from the inputs and from
the state that its rows read, and carries the gradient of the state. The states are either kept from
the forward pass, or a few of them are and the others are computed again, one group of chunks after
the other; never by subtraction.

Shape letters: B batch, T length, C chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from fast_attention.linear.chunked.causal_chunk import Past, add_first_key, read_causal
from fast_attention.linear.chunked.causal_chunk_backward import RowCotangents, pull_back_causal
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.chunked.chunk_decay import (
    chunk_decay,
    decayed_sums,
    pull_back_decay,
)
from fast_attention.linear.chunked.chunk_state import absorb_keys, next_state
from fast_attention.linear.chunked.gradient_buffers import (
    add_decay_gradient,
    add_key_gradient,
    add_query_gradient,
    as_cotangent,
    gradient_buffers,
    with_first_decay,
)
from fast_attention.linear.chunked.loops import scan_chunks, scan_chunks_back
from fast_attention.linear.chunked.output_buffers import (
    empty_output,
    parts_gradient,
    write_output,
)
from fast_attention.linear.chunked.slices import (
    causal_sight,
    exponents_of,
    key_features,
    query_features,
)
from fast_attention.linear.rounded_products import einsum_of
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import is_symbolic, smaller
from fast_attention.linear.types import Inputs, Parts, Plan

# Up to this many chunks all states are kept unless the caller says otherwise.
FEW_CHUNKS = 64


def forward(plan: Plan, inputs: Inputs, *, save: bool):
    """Returns output and final state, and what :func:`backward` needs if ``save``."""
    length, size, group, unroll = _sizes(plan, inputs)
    einsum = einsum_of(plan, inputs)

    def chunk(carry, start, size):
        state, out = carry
        queries, _ = query_features(plan, inputs, start, size)
        keys, value, _ = key_features(plan, inputs, start, size)
        sight = causal_sight(inputs, start, size)
        decay = chunk_decay(inputs, start, size)
        first, old = add_first_key(state, keys, value, sight, decay)
        read = read_causal(
            first,
            queries,
            keys,
            sight,
            einsum,
            exponents_of(plan, inputs, start, start, size),
            decay=decay,
        )
        numerator = read.past + einsum("bkrc,bkcv->bkrv", read.weights, value)
        out = write_output(
            plan, out, Parts(numerator, read.kept.denominator, read.log_scale), start
        )
        absorbed = absorb_keys(first, keys, sight.enter, sight.keep, fading=decay)
        after = next_state(first, absorbed, value, einsum)
        if not save:
            return (after, out), None
        past = Past(first, old, absorbed.log_scale)
        return (after, out), (read.kept if group else (read.kept, past))

    def group_of_chunks(carry, start, length):
        state, _ = carry
        carry, kept = scan_chunks(chunk, carry, length, size, unroll, start)
        return carry, (state, kept)

    carry = (inputs.state, empty_output(plan, inputs))
    if group and save:
        (state, out), saved = scan_chunks(group_of_chunks, carry, length, group, 1)
    else:
        (state, out), saved = scan_chunks(chunk, carry, length, size, unroll)
    return (out, state), (inputs, out, saved)


def backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    """Returns the gradient of every float array in ``inputs``."""
    inputs, out, saved = residuals
    d_out, d_state = cotangents
    length, size, group, unroll = _sizes(plan, inputs)
    einsum = einsum_of(plan, inputs)
    buffers, outputs_in = gradient_buffers(plan, inputs, out, d_out)

    rerun = functools.partial(pass_chunk, plan, inputs, einsum)

    def chunk(carry, start, size, saved):
        kept, past = saved
        d_kv, d_k_sum, grads = carry
        queries, pull_queries = query_features(plan, inputs, start, size)
        keys, value, pull_keys = key_features(plan, inputs, start, size)
        sight = causal_sight(inputs, start, size)
        decay = chunk_decay(inputs, start, size)
        read = read_causal(
            past.first,
            queries,
            keys,
            sight,
            einsum,
            exponents_of(plan, inputs, start, start, size),
            kept,
            decay=decay,
        )
        d_numerator, d_denominator = parts_gradient(
            plan, inputs, kept.denominator, read.log_scale, *outputs_in(grads), start, size
        )
        d_weights = einsum("bkrv,bkcv->bkrc", d_numerator, value) + d_denominator[..., None]
        d_rows = RowCotangents(d_weights, d_numerator, d_denominator)
        absorbed = absorb_keys(past.first, keys, sight.enter, sight.keep, past.log_scale, decay)
        pulled = pull_back_causal(
            queries,
            keys,
            value,
            past,
            read,
            absorbed,
            d_rows,
            d_kv,
            d_k_sum,
            sight.enter,
            einsum,
        )
        d_value = pulled.value + einsum("bkrc,bkrv->bkcv", pulled.weights, d_numerator)
        if decay is not None:
            found = decayed_sums(
                read,
                past.first,
                absorbed,
                value,
                d_rows,
                pulled.weights * d_weights,
                (d_kv, d_k_sum),
                einsum,
            )
            grads = add_decay_gradient(grads, pull_back_decay(found), start + 1)
        grads = add_query_gradient(grads, pull_queries(pulled.queries), start)
        grads = add_key_gradient(grads, pull_keys(pulled.keys, d_value), start)
        return pulled.kv, pulled.k_sum, grads

    def group_of_chunks(carry, start, length, saved):
        state, kept = saved
        _, pasts = scan_chunks(rerun, state, length, size, unroll, start)
        whole, rest = zip(kept, pasts, strict=True)
        both = whole, (None if kept[1] is None else rest)
        return scan_chunks_back(chunk, carry, both, length, size, unroll, start)

    carry = (d_state.kv, d_state.k_sum, buffers)
    if group:
        carry = scan_chunks_back(group_of_chunks, carry, saved, length, group, 1)
    else:
        carry = scan_chunks_back(chunk, carry, saved, length, size, unroll)
    d_kv, d_k_sum, grads = carry
    d_state = LinearAttentionState(d_kv, d_k_sum, None)
    return as_cotangent(inputs, with_first_decay(inputs, grads, d_state), d_state)


def _sizes(plan: Plan, inputs: Inputs) -> tuple[int, int, int, int]:
    """Returns length, chunk size, positions in a group (0: all states are kept), and unroll."""
    length = inputs.query.shape[1]
    size, unroll = planned_chunk(plan, inputs)
    size = smaller(size, length)
    return length, size, group_length(plan, length, size), unroll


def pass_chunk(
    plan: Plan, inputs: Inputs, einsum: Any, state: LinearAttentionState, start: Any, size: int
) -> tuple[LinearAttentionState, Past]:
    """Adds the keys of a chunk again; returns the next state, and what the chunk read it from."""
    keys, value, _ = key_features(plan, inputs, start, size)
    sight = causal_sight(inputs, start, size)
    decay = chunk_decay(inputs, start, size)
    first, old = add_first_key(state, keys, value, sight, decay)
    absorbed = absorb_keys(first, keys, sight.enter, sight.keep, fading=decay)
    return next_state(first, absorbed, value, einsum), Past(first, old, absorbed.log_scale)


def group_length(plan: Plan, length: int, size: int) -> int:
    """Returns the positions in a group of chunks; 0 where all states are kept."""
    if is_symbolic(length):
        return 0
    count = length // size if size else 0
    few = plan.saved_states == "few" or (plan.saved_states is None and count > FEW_CHUNKS)
    if not few or count < 2:
        return 0
    # Near the square root as many states are kept as are computed again at a time; a divisor
    # leaves no shorter last group, which would be compiled by itself.
    root = math.isqrt(count - 1) + 1
    group = next((n for n in range(root, 2 * root) if count % n == 0), root)
    return group * size
