"""Bidirectional linear attention, backward: queries into the state's cotangent, then keys.

Both read the final state and its scale, which no key exceeds by more than 2^80.

Letters are those of :mod:`.chunk`.
"""

from __future__ import annotations

from typing import Any

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.chunked.loops import scan_chunks_back
from fast_attention.linear.time_minor_chunks.chunk import (
    call_of,
    load_denominators,
    load_keys,
    load_queries,
    varying,
)
from fast_attention.linear.time_minor_chunks.gradients import (
    StateCotangent,
    add_key_gradient,
    add_query_gradient,
    add_read,
    cotangents_of_rows,
    empty_gradients,
    entered_gradient,
    finished_gradients,
    outputs_in,
    outputs_of,
    pulled_keys,
    pulled_queries,
    read_gradient,
    value_gradient,
)
from fast_attention.linear.types import Inputs, Plan


def backward(plan: Plan, inputs: Inputs, out: Array, kept: Any, cotangents: Any) -> Inputs:
    """Returns the gradient of every float array in the inputs.

    Args:
      plan: static choices.
      inputs: arrays.
      out: of the forward pass.
      kept: by it.
      cotangents: of its output and its state.
    """
    d_out, d_last = cotangents
    state, denominators = kept
    queries_length, keys_length = inputs.query.shape[1], inputs.key.shape[1]
    size, unroll = planned_chunk(plan, inputs)
    call = call_of(plan, inputs)
    outputs = outputs_of(out, d_out)

    def read(carry, start, size, _):
        d_state, grads = carry
        denominator = load_denominators(call, denominators, start, size)
        given = outputs_in(call, outputs, grads)
        rows = cotangents_of_rows(call, plan, given, denominator, start)
        features, pull = pulled_queries(call, load_queries(call, start, size), state.scale)
        pulled = pull(read_gradient(call, rows, state.rows))
        grads = add_query_gradient(call, grads, pulled, start)
        return add_read(call, d_state, rows, features), grads

    carry = StateCotangent(d_last.kv, d_last.k_sum), empty_gradients(call, outputs)
    d_state, grads = scan_chunks_back(
        read,
        varying(inputs, carry),
        (None, None),
        queries_length,
        min(size, queries_length),
        unroll,
    )

    def absorb(grads, start, size, _):
        keys = load_keys(call, start, size)
        features, pull = pulled_keys(call, keys, state.scale)
        pulled = pull(entered_gradient(call, keys, d_state))
        d_value = value_gradient(call, features, d_state)
        return add_key_gradient(call, grads, pulled, d_value, start)

    grads = scan_chunks_back(
        absorb, grads, (None, None), keys_length, min(size, keys_length), unroll
    )
    return finished_gradients(call, inputs, grads, d_state, state.scale)
