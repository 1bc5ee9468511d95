"""Causal linear attention, forward: one scan over chunks.

Keys are read, and enter the state, on one scale for each feature: that of the state, which some key
seen before attains. So no maximum over a chunk is taken, nothing inside it is rescaled, and one
product of features is a weight in the units of what is read from the state.

The scale serves as long as no key exceeds it by 2^80 (:data:`.chunk.LIMIT`). Where one does, rows
before it are right as they are; from it on the chunk is computed again on the maximum of the scale
and that key, up to the next such key. So a scale depends on keys that every row on it sees, and the
future cannot change the past by a bit.

Letters are those of :mod:`.chunk`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.chunked.loops import scan_chunks
from fast_attention.linear.time_minor_chunks.chunk import (
    LIMIT,
    Call,
    Keys,
    State,
    anywhere,
    beside_groups,
    call_of,
    empty_output,
    exceeding,
    finished,
    first_state,
    last_state,
    load_keys,
    load_queries,
    normalised,
    of_heads,
    query_features,
    varying,
    with_first_scale,
    write,
)
from fast_attention.linear.types import Inputs, Plan


def forward(plan: Plan, inputs: Inputs) -> Any:
    """Returns output and final state."""
    length = inputs.query.shape[1]
    size, unroll = planned_chunk(plan, inputs)
    call = call_of(plan, inputs)

    def chunk(carry, start, size):
        state, out = carry
        query, keys = load_queries(call, start, size), load_keys(call, start, size)
        before = with_first_scale(call, state, keys)
        read = _attend(call, query, keys, before)
        rows, after = read.rows, State(read.after, before.scale)
        if before.scale is not None:
            over = exceeding(before, read.after)
            rows, after = lax.cond(
                anywhere(over),
                lambda: _attend_on_rising_scales(call, query, keys, before, over, rows, after),
                lambda: (rows, after),
            )
        return (after, write(call, plan, out, rows, start)), None

    carry = varying(inputs, (first_state(call, inputs), empty_output(inputs)))
    (state, out), _ = scan_chunks(chunk, carry, length, min(size, length), unroll)
    return finished(call, out), last_state(call, state, inputs)


class _Read(NamedTuple):
    """A chunk on one scale.

    Attributes:
      rows: numerators, and denominators below them, ``[B, K, G, V + 16, C]``.
      after: rows of the state after the chunk.
      logs: of keys on the scale, ``[B, K, C, M]``; None for maps without exponents.
    """

    rows: Array
    after: Array
    logs: Array | None


def _attend(call: Call, query: Array, keys: Keys, before: State) -> _Read:
    logs, x = None, call.features.of_keys(keys.key, keys.bias, keys.seen)
    if before.scale is not None:
        logs = x - before.scale[:, :, None]
        x = call.features.exp(logs)
    key = call.stored(x)
    queries = query_features(call, query, before.scale)
    position = jnp.arange(query.shape[-1])
    seen = jnp.expand_dims(position[:, None] <= position[None], tuple(range(queries.ndim - 2)))
    pairs = call.stored(jnp.where(seen, call.product("bkcm,bkgqm->bkgcq", key, queries), 0))
    rows = call.product("bkvm,bkgqm->bkgvq", before.rows, queries)
    rows = rows + call.product("bkvc,bkgcq->bkgvq", keys.value, pairs)
    after = before.rows + call.product("bkvc,bkcm->bkvm", keys.value, key)
    return _Read(rows, after, logs)


def _attend_on_rising_scales(
    call: Call,
    query: Array,
    keys: Keys,
    before: State,
    over: Array,
    rows: Array,
    after: State,
) -> tuple[Array, State]:
    """Computes rows from the first key on that exceeds the scale, and the state.

    Args:
      call: the call.
      query: of the chunk, ``[B, K, G, D, C]``.
      keys: of the chunk.
      before: the state before it, with the scale of the rows given.
      over: the heads that are computed again, bool ``[B, K]``.
      rows: of the chunk on that scale.
      after: the state after the chunk on that scale.
    """
    size = query.shape[-1]
    position = jnp.arange(size, dtype=jnp.int32)[None, None]
    assert before.scale is not None
    start_scale, limit = before.scale, LIMIT * call.features.log_of_2

    def stretch(carry):
        scale, low, first, rows, after = carry
        moved = before.rows * call.features.exp(start_scale - scale)[:, :, None]
        read = _attend(call, query, keys, State(moved, scale))
        assert read.logs is not None
        # The key at which the last stretch ended made the scale of this one.
        later = position >= jnp.where(first, low, low + 1)[..., None]
        exceeds = (read.logs.max(axis=-1) > limit) & later
        high = jnp.where(exceeds, position, size).min(axis=-1)
        # Rows of the first stretch are right as they are.
        ours = (position >= low[..., None]) & (position < high[..., None]) & ~first
        rows = jnp.where(beside_groups(ours[:, :, None], rows), read.rows, rows)
        done = (low < size) & (high == size)
        after = of_heads(done, State(read.after, scale), after)
        here = (position == high[..., None])[..., None]
        rise = jnp.where(here, read.logs, 0).sum(axis=2)
        return scale + jnp.maximum(rise, 0), high, jnp.zeros_like(first), rows, after

    low = jnp.where(over, 0, size).astype(jnp.int32)
    carry = vary_alike((start_scale, low, jnp.array(True), rows, after))
    *_, rows, after = lax.while_loop(lambda carry: jnp.any(carry[1] < size), stretch, carry)
    return rows, of_heads(over, normalised(call, after), after)
