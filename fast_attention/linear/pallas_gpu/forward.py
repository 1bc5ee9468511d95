"""The forward kernels: causal, and bidirectional.

The scheme is that of :mod:`fast_attention.linear.chunked.causal_chunk`: keys are absorbed into a
state on a running maximum per feature; inside a chunk every row sees the first key, read on the
scale of the state with that key, and later keys enter pair by pair with a factor of their own. No
maximum looks past its row.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal_chunk import LARGEST_EXPONENT
from fast_attention.linear.chunked.wide_pairs import HEADROOM
from fast_attention.linear.pallas_gpu.program import (
    Operands,
    Program,
    Sizes,
    float32,
    launch,
    loop,
    piece,
    visible_scale,
)
from fast_attention.linear.pallas_gpu.state import (
    Maxima,
    State,
    absorb,
    copy_state,
    fetch_state_vectors,
    first_decay,
)
from fast_attention.linear.pallas_gpu.tiles import (
    TILE,
    Tiles,
    spread_columns,
    spread_rows,
)
from fast_attention.linear.state import EMPTY_LOG_SCALE


class Result(NamedTuple):
    """What a forward kernel returns.

    Attributes:
      numerator: ``[B, T, H, V]``.
      denominator: ``[B, H, T]``.
      state: after the last key, for every query head.
      maxima: for the backward pass; those of a bidirectional call are the row maxima alone.
    """

    numerator: Any
    denominator: Any
    state: State
    maxima: Maxima


def forward(sizes: Sizes, operands: Operands, state: State, *, causal: bool) -> Result:
    """Computes attention up to its division.

    Args:
      sizes: of the call.
      operands: arrays, padded.
      state: before the first key, of every key head.
      causal: position t sees keys 0..t.
    """
    head = (sizes.batch, sizes.heads)
    chunks, features = sizes.keys // TILE, sizes.features
    outputs = Result(
        numerator=float32(sizes.batch, sizes.queries, sizes.heads, sizes.value_dim),
        denominator=float32(*head, sizes.queries),
        state=State(
            float32(*head, features, sizes.value_dim),
            float32(*head, features),
            float32(*head, features),
        ),
        maxima=Maxima(
            row_max=float32(*head, sizes.queries),
            pair_max=float32(*head, sizes.queries) if causal else None,
            key_shift=float32(*head, sizes.keys) if causal else None,
            scales=float32(*head, chunks, features) if causal else None,
            first_scales=float32(*head, chunks, features) if causal else None,
        ),
    )

    def body(tiles: Tiles, inputs: Any, out: Result, shared: dict[str, Any]) -> None:
        operands, state = inputs
        program = Program(tiles, sizes, operands, shared)
        copy_state(program, state, out.state, program.key_head)
        (_causal if causal else _bidirectional)(program, out)

    return launch(body, sizes, (operands, state), outputs, forward_memory(sizes, len(operands.key)))


def forward_memory(sizes: Sizes, input_parts: int) -> dict[str, tuple[int, int] | int]:
    """Returns the shared memory of the forward kernels by name."""
    value_parts = 1 if input_parts == 1 else sizes.parts
    return {
        "query": (input_parts, sizes.head_dim),
        "key": (input_parts, sizes.head_dim),
        "value": (value_parts, sizes.value_dim),
        "weights": (3, sizes.head_dim),
        "features": (sizes.parts, TILE),
        "pairs": (sizes.parts, TILE),
        "state": (sizes.parts, sizes.value_dim),
        "stage": (0, sizes.value_dim),
        "key_log": TILE,
        "key_shift": TILE,
        "row_max": TILE,
        "pair_max": TILE,
        "denominator": TILE,
        "scale": TILE,
        "next_scale": TILE,
        "first": TILE,
        "k_sum": TILE,
    }


def _causal(program: Program, out: Result) -> None:
    loop(
        program.tiles,
        program.sizes.keys // TILE,
        lambda chunk, _: _causal_chunk(program, out, chunk),
    )


def _causal_chunk(program: Program, out: Result, chunk: Array) -> None:
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, operands, maxima = program.batch, program.head, program.operands, out.maxima
    tiles.fetch(
        *program.queries(operands.query, "query", chunk),
        *program.keys(operands.key, "key", chunk),
        *program.keys(operands.value, "value", chunk),
        program.key_log_copy(chunk),
    )

    def find_maxima(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row_max, key_max, seen = carry
        program.fetch_weights(tile)
        fetch_state_vectors(program, out.state, tile)
        key_logs = program.key_logs(tile)
        is_first = tiles.positions(chunk)[0] == chunk * TILE
        first_key = jnp.max(jnp.where(is_first, key_logs, -jnp.inf), axis=0)
        first = jnp.maximum(tiles.columns(shared["scale"]), first_key)
        shared["first"][...] = first
        tiles.send((shared["first"], maxima.first_scales.at[b, h, chunk, piece(tile)]))
        shift = spread_columns(visible_scale(first))
        return (
            jnp.maximum(row_max, jnp.max(program.query_logs(tile) + shift, axis=1)),
            jnp.maximum(key_max, jnp.max(key_logs - shift, axis=1)),
            jnp.maximum(seen, jnp.max(spread_columns(first), axis=1)),
        )

    lowest = tiles.full_rows(-jnp.inf)
    row_max, key_max, seen = program.over_tiles(find_maxima, (lowest, lowest, lowest))
    # The first key of the chunk is read on the scale of the state with it, where it is at most 1.
    key_shift = jnp.where(tiles.row_numbers() == 0, 0.0, key_max - HEADROOM)
    shared["key_shift"][...] = key_shift
    shared["row_max"][...] = row_max

    def read(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        products, numerator, denominator = carry
        program.fetch_weights(tile)
        fetch_state_vectors(program, out.state, tile)
        tiles.fetch((maxima.first_scales.at[b, h, chunk, piece(tile)], shared["first"]))
        first = tiles.columns(shared["first"])
        shift = spread_columns(visible_scale(first))
        key_logs = program.key_logs(tile)
        tiles.store(shared["features"], jnp.exp(key_logs - shift - spread_rows(key_shift)))
        queries = jnp.exp(program.query_logs(tile) + shift - spread_rows(row_max))
        tiles.store(shared["pairs"], queries)
        k_sum = tiles.columns(shared["k_sum"]) * jnp.exp(tiles.columns(shared["scale"]) - first)
        denominator = denominator + jnp.sum(queries * spread_columns(k_sum), axis=1)
        products = tiles.matmul(
            shared["pairs"], shared["features"], transpose_right=True, add=products
        )
        kv = program.read_matrix(out.state.kv.at[b, h, piece(tile)])
        tiles.store(shared["state"], kv * first_decay(program))
        numerator = tiles.matmul(shared["pairs"], shared["state"], add=numerator)
        absorb(program, out.state, tile)
        tiles.send((shared["next_scale"], maxima.scales.at[b, h, chunk, piece(tile)]))
        return products, numerator, denominator

    products, numerator, denominator = program.over_tiles(
        read, (tiles.full(0.0, TILE), tiles.full(0.0, sizes.value_dim), tiles.full_rows(0.0))
    )

    rows, columns = tiles.positions(chunk)
    pairs = columns <= rows
    shift = spread_columns(tiles.columns(shared["key_shift"]))
    later = columns > chunk * TILE
    logs = jnp.where(pairs & later, jnp.log(products) + shift, -jnp.inf)
    # What rows read from the state and the first key is at most about 1, if there is any.
    past = jnp.where(seen > 0.5 * EMPTY_LOG_SCALE, 0.0, EMPTY_LOG_SCALE)
    pair_max = jnp.maximum(past, jnp.max(logs, axis=1))
    weights = products * jnp.exp(jnp.minimum(shift - spread_rows(pair_max), LARGEST_EXPONENT))
    weights = jnp.where(pairs & (products > 0), weights, 0.0)
    gain = jnp.exp(past - pair_max)
    tiles.store(shared["pairs"], weights)
    numerator = numerator * spread_rows(gain, sizes.value_dim)
    numerator = tiles.matmul(shared["pairs"], shared["value"], order=sizes.parts, add=numerator)
    shared["denominator"][...] = denominator * gain + jnp.sum(weights, axis=1)
    shared["pair_max"][...] = pair_max
    here = piece(chunk)
    tiles.send(
        (shared["denominator"], out.denominator.at[b, h, here]),
        (shared["row_max"], maxima.row_max.at[b, h, here]),
        (shared["pair_max"], maxima.pair_max.at[b, h, here]),
        (shared["key_shift"], maxima.key_shift.at[b, h, here]),
    )
    program.write_matrix(out.numerator.at[b, here, h], numerator)


def _bidirectional(program: Program, out: Result) -> None:
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, operands = program.batch, program.head, program.operands

    def absorb_chunk(chunk: Array, _: Any) -> None:
        tiles.fetch(
            *program.keys(operands.key, "key", chunk),
            *program.keys(operands.value, "value", chunk),
            program.key_log_copy(chunk),
        )

        def absorb_tile(tile: Array, _: Any) -> None:
            program.fetch_weights(tile)
            fetch_state_vectors(program, out.state, tile)
            program.read_matrix(out.state.kv.at[b, h, piece(tile)])
            absorb(program, out.state, tile)

        program.over_tiles(absorb_tile)

    loop(tiles, sizes.keys // TILE, absorb_chunk)

    def read_chunk(chunk: Array, _: Any) -> None:
        tiles.fetch(*program.queries(operands.query, "query", chunk))

        def scaled(tile: Array) -> Array:
            program.fetch_weights(tile)
            fetch_state_vectors(program, out.state, tile)
            scale = visible_scale(tiles.columns(shared["scale"]))
            return program.query_logs(tile) + spread_columns(scale)

        row_max = program.over_tiles(
            lambda tile, row_max: jnp.maximum(row_max, jnp.max(scaled(tile), axis=1)),
            tiles.full_rows(-jnp.inf),
        )

        def read(tile: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            numerator, denominator = carry
            queries = jnp.exp(scaled(tile) - spread_rows(row_max))
            tiles.store(shared["pairs"], queries)
            k_sum = spread_columns(tiles.columns(shared["k_sum"]))
            kv = program.read_matrix(out.state.kv.at[b, h, piece(tile)])
            tiles.store(shared["state"], kv)
            numerator = tiles.matmul(shared["pairs"], shared["state"], add=numerator)
            return numerator, denominator + jnp.sum(queries * k_sum, axis=1)

        numerator, denominator = program.over_tiles(
            read, (tiles.full(0.0, sizes.value_dim), tiles.full_rows(0.0))
        )
        shared["denominator"][...] = denominator
        shared["row_max"][...] = row_max
        here = piece(chunk)
        tiles.send(
            (shared["denominator"], out.denominator.at[b, h, here]),
            (shared["row_max"], out.maxima.row_max.at[b, h, here]),
        )
        program.write_matrix(out.numerator.at[b, here, h], numerator)

    loop(tiles, sizes.queries // TILE, read_chunk)
