"""Causal linear attention in blocks, the chunks of a block in parallel.

The passes walk over the blocks; inside one, each step is an operation on all of its chunks. The
backward pass keeps the state before each block and makes all else of it again.

Shape letters: B batch, T length, K key/value heads, N chunks of a block, C chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear.chunked.causal_chunk import (
    CausalRead,
    Kept,
    Past,
    add_first_key,
    read_causal,
)
from fast_attention.linear.chunked.causal_chunk_backward import (
    RowCotangents,
    pull_back_absorbed,
    pull_back_read,
    pull_back_state,
)
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
from fast_attention.linear.chunked.slices import exponents_of, key_features, query_features
from fast_attention.linear.chunked.wide_pairs import Exponents
from fast_attention.linear.parallel_chunks.block_sight import BlockSight, block_sight
from fast_attention.linear.parallel_chunks.block_sizes import block_sizes
from fast_attention.linear.parallel_chunks.block_states import (
    BlockStates,
    block_states,
    pull_back_states,
)
from fast_attention.linear.rounded_products import Einsum, einsum_of
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.types import Inputs, Parts, Plan


class _Block(NamedTuple):
    """What both passes make of a block; arrays are ``[B * K, N, ...]``."""

    queries: Features
    keys: Features
    value: Array
    sight: BlockSight
    states: BlockStates
    past: Past
    read: CausalRead
    pull_queries: Any
    pull_keys: Any


def forward(plan: Plan, inputs: Inputs, *, save: bool) -> tuple[Any, Any]:
    """Returns output and final state, and what :func:`backward` needs if ``save``."""
    sizes = block_sizes(plan, inputs)
    einsum = einsum_of(plan, inputs)
    heads = inputs.state.kv.shape[:2]

    def block(carry: Any, start: Array | int, size: int) -> tuple[Any, Any]:
        kept = []
        for offset, length, chunks in _pieces(size, sizes.chunk):
            state, out = carry
            made = _make(plan, inputs, einsum, state, start + offset, length, chunks)
            read = made.read
            numerator = read.past + einsum("bkrc,bkcv->bkrv", read.weights, made.value)
            parts = Parts(numerator, read.kept.denominator, read.log_scale)
            out = write_output(plan, out, _unfold(parts, heads), start + offset, chunks)
            carry = made.states.after, out
            kept.append((state, read.kept) if save else None)
        return carry, tuple(kept)

    carry = (_flat(inputs.state), empty_output(plan, inputs))
    (state, out), saved = scan_chunks(
        block, carry, inputs.query.shape[1], sizes.block, plan.unroll or 1
    )
    return (out, _unflat(state, heads)), (inputs, out, saved)


def backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    """Returns the gradient of every float array in ``inputs``."""
    inputs, out, saved = residuals
    d_out, d_state = cotangents
    sizes = block_sizes(plan, inputs)
    einsum = einsum_of(plan, inputs)
    heads = inputs.state.kv.shape[:2]
    buffers, outputs_in = gradient_buffers(plan, inputs, out, d_out)

    def block(carry: Any, start: Array | int, size: int, saved: Any) -> Any:
        d_after, grads = carry
        pieces = zip(_pieces(size, sizes.chunk), saved, strict=True)
        for (offset, length, chunks), (state, kept) in reversed(list(pieces)):
            at = start + offset
            made = _make(plan, inputs, einsum, state, at, length, chunks, kept)
            past, read, value, states = made.past, made.read, made.value, made.states
            kept_rows, log_scale = _unfold((kept.denominator, read.log_scale), heads)
            d_numerator, d_denominator = _fold(
                parts_gradient(
                    plan, inputs, kept_rows, log_scale, *outputs_in(grads), at, length, chunks
                ),
                chunks,
            )
            d_weights = einsum("bkrv,bkcv->bkrc", d_numerator, value) + d_denominator[..., None]
            d_rows = RowCotangents(d_weights, d_numerator, d_denominator)
            d_first = pull_back_state(read, d_rows, einsum)
            d_before = d_first
            if past.old is not None:
                d_before = d_first[0] * past.old[..., None, :], d_first[1] * past.old
            d_after, d_chunks = pull_back_states(states.factor, d_before, d_after)
            pulled = pull_back_read(
                made.queries,
                made.keys,
                value,
                past,
                read,
                d_rows,
                d_first,
                pull_back_absorbed(states.absorbed, value, *d_chunks, einsum, made.sight.enter),
                einsum,
            )
            d_value = pulled.value + einsum("bkrc,bkrv->bkcv", pulled.weights, d_numerator)
            d_queries, d_keys, d_value = _unfold((pulled.queries, pulled.keys, d_value), heads)
            grads = add_query_gradient(grads, made.pull_queries(d_queries), at)
            grads = add_key_gradient(grads, made.pull_keys(d_keys, d_value), at)
        return d_after, grads

    carry = (_flat((d_state.kv, d_state.k_sum)), buffers)
    d_after, grads = scan_chunks_back(
        block, carry, saved, inputs.query.shape[1], sizes.block, plan.unroll or 1
    )
    d_kv, d_k_sum = _unflat(d_after, heads)
    return as_cotangent(inputs, grads, LinearAttentionState(d_kv, d_k_sum, None))


def _make(
    plan: Plan,
    inputs: Inputs,
    einsum: Einsum,
    state: LinearAttentionState,
    start: Array | int,
    size: int,
    chunks: int,
    kept: Kept | None = None,
) -> _Block:
    queries, pull_queries = query_features(plan, inputs, start, size, chunks)
    keys, value, pull_keys = key_features(plan, inputs, start, size)
    queries, keys, value = _fold((queries, keys, value), chunks)
    sight = block_sight(inputs, start, size, chunks)
    states = block_states(state, keys, value, sight.enter, sight.seen, einsum)
    first, old = add_first_key(states.before, keys, value, sight.chunks)
    exponents = _exponents(plan, inputs, start, size, chunks)
    read = read_causal(first, queries, keys, sight.chunks, einsum, exponents, kept)
    past = Past(first, old, None)
    return _Block(queries, keys, value, sight, states, past, read, pull_queries, pull_keys)


def _exponents(plan: Plan, inputs: Inputs, start: Array | int, size: int, chunks: int) -> Exponents:
    """Returns what makes the exponents of queries and keys of a block anew."""
    heads = inputs.state.kv.shape[:2]
    of_keys = exponents_of(plan, inputs, start, start, size).of_keys

    def of_places(places: Array) -> Array:
        places = places + (size // chunks * jnp.arange(chunks))[None, :, None]
        return of_keys(places.reshape(*heads, -1)).reshape(*places.shape, -1)

    def of_rows() -> Array:
        return _fold(query_features(plan, inputs, start, size, chunks)[0].log, chunks)

    return Exponents(of_rows, of_places)


def _pieces(size: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a block into whole chunks and the rest: start, size and chunks of each piece."""
    whole, rest = divmod(size, chunk)
    if whole:
        yield 0, whole * chunk, whole
    if rest:
        yield whole * chunk, rest, 1


def _fold(tree: Any, chunks: int) -> Any:
    """From ``[B, K, N * rows, ...]`` to ``[B * K, N, rows, ...]``."""
    return jax.tree.map(lambda x: x.reshape(-1, chunks, x.shape[2] // chunks, *x.shape[3:]), tree)


def _unfold(tree: Any, heads: tuple[int, ...]) -> Any:
    """From ``[B * K, N, rows, ...]`` to ``[B, K, N * rows, ...]``."""
    return jax.tree.map(lambda x: x.reshape(*heads, x.shape[1] * x.shape[2], *x.shape[3:]), tree)


def _flat(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _unflat(tree: Any, heads: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda x: x.reshape(*heads, *x.shape[1:]), tree)
