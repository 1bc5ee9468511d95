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
    load_keys,
    load_queries,
    varying,
)
from fast_attention.linear.time_minor_chunks.gradients import (
    add_key_gradient,
    add_query_gradient,
    cotangents_of_rows,
    empty_gradients,
    entered_gradient,
    finished_gradients,
    last_cotangent,
    outputs_of,
    pulled_keys,
    pulled_queries,
    read_gradient,
    state_gradient,
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
    d_out, d_state = cotangents
    state, denominators = kept
    queries_length, keys_length = inputs.query.shape[1], inputs.key.shape[1]
    size, unroll = planned_chunk(plan, inputs)
    call = call_of(plan, inputs)
    outputs = outputs_of(out, d_out)

    def read(carry, start, size, denominator):
        d_rows, grads = carry
        rows = cotangents_of_rows(call, plan, outputs, denominator, start)
        features, pull = pulled_queries(call, load_queries(call, start, size), state.scale)
        grads = add_query_gradient(call, grads, pull(read_gradient(call, rows, state.rows)), start)
        return d_rows + state_gradient(call, rows, features), grads

    carry = varying(inputs, (last_cotangent(d_state), empty_gradients(call)))
    d_rows, grads = scan_chunks_back(
        read, carry, denominators, queries_length, min(size, queries_length), unroll
    )

    def absorb(grads, start, size, _):
        keys = load_keys(call, start, size)
        features, pull = pulled_keys(call, keys, state.scale)
        d_value = value_gradient(call, features, d_rows)
        pulled = pull(entered_gradient(call, keys, d_rows))
        return add_key_gradient(call, grads, pulled, d_value, start)

    grads = scan_chunks_back(
        absorb, grads, (None, None), keys_length, min(size, keys_length), unroll
    )
    return finished_gradients(call, inputs, grads, d_rows, state.scale)
