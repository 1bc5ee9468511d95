"""Bidirectional linear attention, forward: chunks of keys into a state, which all queries read.

The scale of the state is that of the first key until a key exceeds it by 2^80
(:data:`.chunk.LIMIT`); then it is raised to the maximum of the chunk.

Letters are those of :mod:`.chunk`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.chunked.loops import scan_chunks
from fast_attention.linear.time_minor_chunks.chunk import (
    Call,
    Keys,
    State,
    call_of,
    empty_denominators,
    empty_output,
    exceeding,
    finished,
    first_state,
    last_state,
    load_keys,
    load_queries,
    of_heads,
    query_features,
    varying,
    where_needed,
    with_first_scale,
    write,
    write_denominators,
)
from fast_attention.linear.types import Inputs, Plan


def forward(plan: Plan, inputs: Inputs, *, save: bool) -> Any:
    """Returns output and final state, and what :func:`.bidirectional_backward.backward` needs."""
    queries_length, keys_length = inputs.query.shape[1], inputs.key.shape[1]
    size, unroll = planned_chunk(plan, inputs)
    call = call_of(plan, inputs)

    def absorb(state, start, size):
        keys = load_keys(call, start, size)
        before = with_first_scale(call, state, keys)
        x = call.features.of_keys(keys.key, keys.bias, keys.seen)
        if before.scale is not None:
            x = call.features.exp(x - before.scale[:, :, None])
        added = call.product("bkvc,bkcm->bkvm", keys.value, call.stored(x))
        after = State(before.rows + added, before.scale)
        if before.scale is None:
            return after, None
        over = exceeding(before, after.rows)
        absorbed = where_needed(over, lambda: _raised(call, keys, before, over, after), after)
        return absorbed, None

    state = varying(inputs, first_state(call, inputs))
    state, _ = scan_chunks(absorb, state, keys_length, min(size, keys_length), unroll)

    def read(carry, start, size):
        out, kept = carry
        queries = query_features(call, load_queries(call, start, size), state.scale)
        rows = call.product("bkvm,bkgqm->bkgvq", state.rows, queries)
        out, kept = write(call, plan, out, rows, start), write_denominators(kept, rows, start)
        return (out, kept), None

    carry = empty_output(inputs), empty_denominators(inputs) if save else None
    (out, kept), _ = scan_chunks(
        read, varying(inputs, carry), queries_length, min(size, queries_length), unroll
    )
    result = finished(call, out), last_state(call, state, inputs)
    return result, (state, kept) if save else None


def _raised(call: Call, keys: Keys, before: State, over: Array, after: State) -> State:
    """Returns the state after a chunk, on its maximum for the heads that are over the limit."""
    assert before.scale is not None
    logs = call.features.of_keys(keys.key, keys.bias, keys.seen)
    scale = jnp.maximum(before.scale, logs.max(axis=2))
    keys_on_it = call.stored(call.features.exp(logs - scale[:, :, None]))
    rows = before.rows * call.features.exp(before.scale - scale)[:, :, None]
    rows = rows + call.product("bkvc,bkcm->bkvm", keys.value, keys_on_it)
    return of_heads(over, State(rows, scale), after)
