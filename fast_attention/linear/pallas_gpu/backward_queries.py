"""Gradients of queries, and of the projection through them; letters of :mod:`.program`.

The causal kernel walks forward and carries the state. The bidirectional one reads the final state
and also adds up its cotangent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_gpu.backward import (
    Given,
    backward_memory,
    gain_of,
    key_copies,
    pair_factor,
    pull_back_logs,
    row_copies,
    start_weights,
    through_exp,
)
from fast_attention.linear.pallas_gpu.program import (
    Program,
    Sizes,
    float32,
    launch,
    loop,
    piece,
    visible_scale,
)
from fast_attention.linear.pallas_gpu.state import (
    State,
    absorb,
    fetch_state_vectors,
    first_decay,
    start_cotangent,
    start_state,
)
from fast_attention.linear.pallas_gpu.tiles import (
    TILE,
    Tiles,
    spread_columns,
    spread_rows,
)


class QueryGradients(NamedTuple):
    """What the kernel returns.

    Attributes:
      query: ``[B, T, H, D]``.
      weights: ``[B, H, M, D]``.
      state: of every query head: its working state if causal, its cotangent with all queries if
        not (without a scale).
    """

    query: Any
    weights: Any
    state: State


def query_gradients(sizes: Sizes, given: Given, *, causal: bool) -> QueryGradients:
    """Computes the gradients; see :class:`QueryGradients`."""
    head = (sizes.batch, sizes.heads)
    outputs = QueryGradients(
        query=jax.ShapeDtypeStruct(
            (sizes.batch, sizes.queries, sizes.heads, sizes.head_dim), sizes.gradient_dtype
        ),
        weights=float32(*head, sizes.features, sizes.head_dim),
        state=State(
            float32(*head, sizes.features, sizes.value_dim),
            float32(*head, sizes.features),
            float32(*head, sizes.features) if causal else None,
        ),
    )

    def body(tiles: Tiles, given: Given, out: QueryGradients, shared: dict[str, Any]) -> None:
        program = Program(tiles, sizes, given.operands, shared)
        start_weights(program, None, out.weights)
        if causal:
            assert given.sources is not None
            start_state(program, given.sources, out.state, causal=True)
        else:
            start_cotangent(program, given.cotangents.state, out.state)
        chunk = _causal_chunk if causal else _bidirectional_chunk
        loop(tiles, sizes.queries // TILE, lambda i, _: chunk(program, given, out, i))

    return launch(body, sizes, given, outputs, backward_memory(sizes, len(given.operands.query)))


def _causal_chunk(program: Program, given: Given, out: QueryGradients, chunk: Array) -> None:
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, maxima = program.batch, program.head, given.maxima
    assert maxima is not None
    tiles.fetch(*row_copies(program, given, chunk), *key_copies(program, given, chunk))

    # Registers are scarce: vectors are loaded where they are used.
    def rows(name: str) -> Array:
        return spread_rows(tiles.rows(shared[name]))

    queries_at, keys_at = tiles.positions(chunk)
    factor = pair_factor(
        spread_columns(tiles.columns(shared["key_shift"])),
        rows("pair_max"),
        keys_at <= queries_at,
    )
    d_pairs = tiles.matmul(
        shared["numerator"], shared["value"], transpose_right=True, order=sizes.parts
    )
    tiles.store(shared["pairs"], (d_pairs + rows("denominator")) * factor)

    def body(tile: Array, d_query: Array) -> Array:
        program.fetch_weights(tile)
        fetch_state_vectors(program, out.state, tile)
        tiles.fetch((maxima.first_scales.at[b, h, chunk, piece(tile)], shared["first"]))
        first = tiles.columns(shared["first"])
        shift = spread_columns(visible_scale(first))
        keys = jnp.exp(program.key_logs(tile) - shift - rows("key_shift"))
        tiles.store(shared["features"], keys)
        kv = program.read_matrix(out.state.kv.at[b, h, piece(tile)])
        tiles.store(shared["state"], kv * first_decay(program))
        k_sum = tiles.columns(shared["k_sum"]) * jnp.exp(tiles.columns(shared["scale"]) - first)
        d_read = tiles.matmul(
            shared["numerator"],
            shared["state"],
            transpose_right=True,
            add=rows("denominator") * spread_columns(k_sum),
        )
        gain = spread_rows(gain_of(tiles.rows(shared["pair_max"])))
        d_queries = tiles.matmul(shared["pairs"], shared["features"], add=d_read * gain)
        queries = jnp.exp(program.query_logs(tile) + shift - rows("row_max"))
        d_logs = through_exp(queries, d_queries)
        absorb(program, out.state, tile)
        return pull_back_logs(program, d_logs, "query", tile, d_query, out.weights)

    d_query = program.over_tiles(body, tiles.full(0.0, sizes.head_dim))
    program.write_rounded(out.query.at[b, piece(chunk), h], d_query, "query")


def _bidirectional_chunk(program: Program, given: Given, out: QueryGradients, chunk: Array) -> None:
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, state = program.batch, program.head, given.state
    assert state is not None
    tiles.fetch(*row_copies(program, given, chunk))
    row_max, d_denominator = tiles.rows(shared["row_max"]), tiles.rows(shared["denominator"])

    def body(tile: Array, d_query: Array) -> Array:
        here = piece(tile)
        program.fetch_weights(tile)
        fetch_state_vectors(program, state, tile)
        shift = spread_columns(visible_scale(tiles.columns(shared["scale"])))
        queries = jnp.exp(program.query_logs(tile) + shift - spread_rows(row_max))
        tiles.store(shared["state"], program.read_matrix(state.kv.at[b, h, here]))
        d_queries = tiles.matmul(shared["numerator"], shared["state"], transpose_right=True)
        k_sum = spread_columns(tiles.columns(shared["k_sum"]))
        d_queries = d_queries + spread_rows(d_denominator) * k_sum

        tiles.store(shared["features"], queries)
        d_kv = program.read_matrix(out.state.kv.at[b, h, here])
        d_kv = d_kv + tiles.matmul(shared["features"], shared["numerator"], transpose_left=True)
        program.write_matrix(out.state.kv.at[b, h, here], d_kv)
        tiles.fetch((out.state.k_sum.at[b, h, here], shared["k_sum"]))
        d_k_sum = jnp.sum(queries * spread_rows(d_denominator), axis=0)
        shared["k_sum"][...] = tiles.columns(shared["k_sum"]) + d_k_sum
        tiles.send((shared["k_sum"], out.state.k_sum.at[b, h, here]))
        d_logs = through_exp(queries, d_queries)
        return pull_back_logs(program, d_logs, "query", tile, d_query, out.weights)

    d_query = program.over_tiles(body, tiles.full(0.0, sizes.head_dim))
    program.write_rounded(out.query.at[b, piece(chunk), h], d_query, "query")
