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

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal import group_length
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.chunked.loops import repeat_while, scan_chunks
from fast_attention.linear.time_minor_chunks.chunk import (
    LIMIT,
    Call,
    Keys,
    State,
    beside_groups,
    call_of,
    empty_denominators,
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
    where_needed,
    with_first_scale,
    write,
    write_denominators,
)
from fast_attention.linear.types import Inputs, Plan


class Sizes(NamedTuple):
    """How a sequence is cut.

    Attributes:
      length: T.
      chunk: positions in a chunk.
      group: positions in a group of chunks, the state before which is saved; 0 where all are.
      unroll: chunks unrolled in the compiled loop.
    """

    length: int
    chunk: int
    group: int
    unroll: int


def sizes_of(plan: Plan, inputs: Inputs) -> Sizes:
    """Returns how a call is cut."""
    length = inputs.query.shape[1]
    size, unroll = planned_chunk(plan, inputs)
    size = min(size, length)
    return Sizes(length, size, group_length(plan, length, size), unroll)


def forward(plan: Plan, inputs: Inputs, *, save: bool) -> Any:
    """Returns output and final state, and what :func:`.causal_backward.backward` needs."""
    length, size, group, unroll = sizes_of(plan, inputs)
    call = call_of(plan, inputs)

    def chunk(carry, start, size):
        state, out, kept = carry
        rows, before, after = pass_chunk(call, state, start, size)
        out, kept = write(call, plan, out, rows, start), write_denominators(kept, rows, start)
        return (after, out, kept), before if save and not group else None

    def group_of_chunks(carry, start, length):
        return scan_chunks(chunk, carry, length, size, unroll, start)[0], carry[0]

    empty = empty_output(inputs), empty_denominators(inputs) if save else None
    carry = varying(inputs, (first_state(call, inputs), *empty))
    if group and save:
        (state, out, kept), states = scan_chunks(group_of_chunks, carry, length, group, 1)
    else:
        (state, out, kept), states = scan_chunks(chunk, carry, length, size, unroll)
    result = finished(call, out), last_state(call, state, inputs)
    return result, (state.scale, kept, states) if save else None


def pass_chunk(
    call: Call, state: State, start: Array | int, size: int
) -> tuple[Array, State, State]:
    """Returns rows ``[B, K, G, V + 16, C]`` of a chunk, the state that it reads, and the next."""
    query, keys = load_queries(call, start, size), load_keys(call, start, size)
    before = with_first_scale(call, state, keys)
    read = read_chunk(call, query, keys, before)
    rows, after = read.rows, State(read.after, before.scale)
    if before.scale is not None:
        over = exceeding(before, read.after)
        usual = rows, after
        rows, after = where_needed(
            over, lambda: _read_on_rising_scales(call, query, keys, before, over, *usual), usual
        )
    return rows, before, after


class Read(NamedTuple):
    """A chunk on one scale.

    Attributes:
      rows: numerators, and denominators below them, ``[B, K, G, V + 16, C]``.
      after: rows of the state after the chunk.
      logs: of keys on the scale, ``[B, K, C, M]``; None for maps without exponents.
    """

    rows: Array
    after: Array
    logs: Array | None


def read_chunk(call: Call, query: Array, keys: Keys, before: State) -> Read:
    """Computes a chunk on the scale of the state before it."""
    logs, x = None, call.features.of_keys(keys.key, keys.bias, keys.seen)
    if before.scale is not None:
        logs = x - before.scale[:, :, None]
        x = call.features.exp(logs)
    key = call.stored(x)
    queries = query_features(call, query, before.scale)
    pairs = call.product("bkcm,bkgqm->bkgcq", key, queries)
    pairs = call.stored(jnp.where(seen_pairs(pairs), pairs, 0))
    rows = call.product("bkvm,bkgqm->bkgvq", before.rows, queries)
    rows = rows + call.product("bkvc,bkgcq->bkgvq", keys.value, pairs)
    after = before.rows + call.product("bkvc,bkcm->bkvm", keys.value, key)
    return Read(rows, after, logs)


def seen_pairs(pairs: Array) -> Array:
    """Returns which keys are seen by which queries of ``[B, K, G, C, C]``, keys first."""
    position = jnp.arange(pairs.shape[-1])
    return jnp.expand_dims(position[:, None] <= position[None], tuple(range(pairs.ndim - 2)))


def next_stretch(
    call: Call, read: Read, scale: Array, stretch: tuple[Array, Array], chosen: Array | None = None
) -> tuple[Array, Array]:
    """Returns the first key of a chunk that exceeds a scale, and the scale that it makes.

    Args:
      call: the call.
      read: the chunk on the scale.
      scale: ``[B, K, M]``.
      stretch: the key at which the last stretch of rows ended, ``[B, K]``, and whether there is
        none.
      chosen: heads that matter, bool ``[B, K]``; None for all.

    Returns:
      Positions ``[B, K]``, the size of the chunk if there is no such key, and a scale.
    """
    assert read.logs is not None
    (low, first), size = stretch, read.logs.shape[2]
    position = jnp.arange(size, dtype=jnp.int32)[None, None]
    # The key at which the last stretch ended made the scale of this one.
    later = position >= jnp.where(first, low, low + 1)[..., None]
    exceeds = (read.logs.max(axis=-1) > LIMIT * call.features.log_of_2) & later
    if chosen is not None:
        exceeds = exceeds & chosen[..., None]
    high = jnp.where(exceeds, position, size).min(axis=-1)
    here = (position == high[..., None])[..., None]
    rise = jnp.where(here, read.logs, 0).sum(axis=2)
    return high, scale + jnp.maximum(rise, 0)


def _read_on_rising_scales(
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
    start_scale = before.scale

    def stretch(carry):
        scale, low, first, rows, after = carry
        moved = before.rows * call.features.exp(start_scale - scale)[:, :, None]
        read = read_chunk(call, query, keys, State(moved, scale))
        high, raised = next_stretch(call, read, scale, (low, first))
        # Rows of the first stretch are right as they are.
        ours = (position >= low[..., None]) & (position < high[..., None]) & ~first
        rows = jnp.where(beside_groups(ours[:, :, None], rows), read.rows, rows)
        done = (low < size) & (high == size)
        after = of_heads(done, State(read.after, scale), after)
        return raised, high, jnp.zeros_like(first), rows, after

    low = jnp.where(over, 0, size).astype(jnp.int32)
    carry = vary_alike((start_scale, low, jnp.array(True), rows, after))
    *_, rows, after = repeat_while(lambda carry: jnp.any(carry[1] < size), stretch, carry, size + 1)
    return rows, of_heads(over, normalised(call, after), after)
