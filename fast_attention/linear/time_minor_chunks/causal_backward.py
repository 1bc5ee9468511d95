"""Causal linear attention, backward: one scan over chunks, from last to first.

Features of a chunk are made again on the scale that the forward pass used. Where that raised the
scale inside the chunk, each stretch of rows between two such keys is pulled back on its own scale,
and what comes from later chunks on the last one.

The states between chunks are saved by the forward pass, or a few of them are and the others are
computed again, one group of chunks after the other.

Letters are those of :mod:`.chunk`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.loops import repeat_while, scan_chunks, scan_chunks_back
from fast_attention.linear.state import EMPTY_LOG_SCALE
from fast_attention.linear.time_minor_chunks.causal import (
    next_stretch,
    pass_chunk,
    read_chunk,
    seen_pairs,
    sizes_of,
)
from fast_attention.linear.time_minor_chunks.chunk import (
    Call,
    Keys,
    State,
    call_of,
    denominators,
    load_denominators,
    load_keys,
    load_queries,
    varying,
    where_needed,
)
from fast_attention.linear.time_minor_chunks.gradients import (
    Rows,
    StateCotangent,
    add_key_gradient,
    add_query_gradient,
    add_read,
    cotangents_of_rows,
    empty_gradients,
    entered_gradient,
    finished_gradients,
    of_some_rows,
    outputs_in,
    outputs_of,
    pulled_keys,
    pulled_queries,
    read_gradient,
    value_gradient,
)
from fast_attention.linear.types import Inputs, Plan


class _Chunk(NamedTuple):
    """What a chunk reads.

    Attributes:
      query: ``[B, K, G, D, C]``.
      keys: of the chunk.
      before: the state before it.
    """

    query: Array
    keys: Keys
    before: State


class _Pulled(NamedTuple):
    """Gradients of a chunk.

    Attributes:
      query: of weights and queries, as from :func:`pulled_queries`.
      key: of weights, keys and biases, as from :func:`pulled_keys`.
      value: ``[B, K, V, C]``.
      state: of the state before.
    """

    query: tuple[Any, ...]
    key: tuple[Any, ...]
    value: Array
    state: StateCotangent


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
    last_scale, denominators_kept, states = kept
    length, size, group, unroll = sizes_of(plan, inputs)
    call = call_of(plan, inputs)
    outputs = outputs_of(out, d_out)

    def chunk(carry, start, size, before):
        d_state, scale, grads = carry
        read = _Chunk(load_queries(call, start, size), load_keys(call, start, size), before)
        given = outputs_in(call, outputs, grads)

        def rows_of(denominator: Array) -> Rows:
            return cotangents_of_rows(call, plan, given, denominator, start)

        d_after = d_state
        if scale is not None:
            # An empty state has no gradient. Else the factor is 1, or the scale rises in the chunk.
            d_after = d_state.times(call.features.exp(before.scale - scale))
        denominator = load_denominators(call, denominators_kept, start, size)
        pulled = _pull_back(call, read, rows_of(denominator), d_after)
        if scale is not None:
            rises = (scale != before.scale) & (before.scale > 0.5 * EMPTY_LOG_SCALE)
            rises = jnp.any(rises, axis=-1)
            usual = pulled
            pulled = where_needed(
                rises,
                lambda: _on_rising_scales(call, read, rows_of, (d_state, scale), rises, usual),
                usual,
            )
        grads = add_query_gradient(call, grads, pulled.query, start)
        grads = add_key_gradient(call, grads, pulled.key, pulled.value, start)
        return pulled.state, before.scale, grads

    def rerun(state, start, size):
        _, before, after = pass_chunk(call, state, start, size)
        return after, before

    def group_of_chunks(carry, start, length, state):
        _, states = scan_chunks(rerun, state, length, size, unroll, start)
        return scan_chunks_back(chunk, carry, states, length, size, unroll, start)

    carry = StateCotangent(d_last.kv, d_last.k_sum), last_scale, empty_gradients(call, outputs)
    carry = varying(inputs, carry)
    if group:
        carry = scan_chunks_back(group_of_chunks, carry, states, length, group, 1)
    else:
        carry = scan_chunks_back(chunk, carry, states, length, size, unroll)
    d_state, scale, grads = carry
    return finished_gradients(call, inputs, grads, d_state, scale)


def _pull_back(
    call: Call, chunk: _Chunk, rows: Rows, d_after: StateCotangent, kept: Array | None = None
) -> _Pulled:
    """Pulls the cotangents of a chunk's rows, and of the state after it, back on one scale.

    Args:
      call: the call.
      chunk: what it reads.
      rows: cotangents.
      d_after: of the state after it, on the scale of that before.
      kept: as in :func:`pulled_keys`.
    """
    queries, pull_queries = pulled_queries(call, chunk.query, chunk.before.scale)
    keys, pull_keys = pulled_keys(call, chunk.keys, chunk.before.scale, kept)
    pairs = call.product("bkcm,bkgqm->bkgcq", keys, queries)
    value = chunk.keys.value[:, :, : rows.numerator.shape[-2]]
    d_pairs = call.product("bkvc,bkgvq->bkgcq", value, rows.numerator)
    d_pairs = d_pairs + rows.denominator[..., None, :]
    seen = seen_pairs(pairs)
    pairs = call.stored(jnp.where(seen, pairs, 0))
    d_pairs = call.stored(jnp.where(seen, d_pairs, 0))
    d_queries = read_gradient(call, rows, chunk.before.rows)
    d_queries = d_queries + call.product("bkgcq,bkcm->bkgqm", d_pairs, keys)
    d_keys = entered_gradient(call, chunk.keys, d_after)
    d_keys = d_keys + call.product("bkgcq,bkgqm->bkcm", d_pairs, queries)
    d_value = value_gradient(call, keys, d_after)
    d_value = d_value + call.product("bkgvq,bkgcq->bkvc", rows.numerator, pairs)
    return _Pulled(
        query=pull_queries(d_queries),
        key=pull_keys(d_keys),
        value=d_value,
        state=add_read(call, d_after, rows, queries),
    )


def _on_rising_scales(
    call: Call,
    chunk: _Chunk,
    rows_of: Any,
    after: tuple[StateCotangent, Array],
    rises: Array,
    usual: _Pulled,
) -> _Pulled:
    """Adds the gradients of stretches of rows, each pulled back on the scale it was computed on.

    Args:
      call: the call.
      chunk: what it reads.
      rows_of: from denominators to cotangents of the rows.
      after: cotangent of the state after the chunk, and its scale.
      rises: heads whose scale rises, bool ``[B, K]``; others have one stretch.
      usual: the result where no scale rises.
    """
    before, (d_state, last) = chunk.before, after
    assert before.scale is not None
    size = chunk.query.shape[-1]
    position = jnp.arange(size, dtype=jnp.int32)[None, None]

    def stretch(carry):
        scale, low, first, total = carry
        rise = call.features.exp(before.scale - scale)
        state = State(before.rows * rise[:, :, None], scale)
        read = read_chunk(call, chunk.query, chunk.keys, state)
        high, raised = next_stretch(call, read, scale, (low, first), rises)
        ours = (position >= low[..., None]) & (position < high[..., None])
        rows = of_some_rows(call, rows_of(denominators(read.rows)), ours)
        done = ((low < size) & (high == size))[..., None]
        d_after = d_state.times(jnp.where(done, call.features.exp(scale - last), 0))
        # Keys from the next stretch on may overflow.
        part = _pull_back(
            call, chunk._replace(before=state), rows, d_after, position < high[..., None]
        )
        part = part._replace(state=part.state.times(rise))
        return raised, high, jnp.zeros_like(first), jax.tree.map(jnp.add, total, part)

    low = jnp.zeros(rises.shape, jnp.int32)
    zeros = jax.tree.map(jnp.zeros_like, usual)
    carry = vary_alike((before.scale, low, jnp.array(True), zeros), usual)
    return repeat_while(lambda carry: jnp.any(carry[1] < size), stretch, carry, size + 1)[-1]
