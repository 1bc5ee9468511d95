"""The forward kernels: causal, bidirectional, and the state of keys alone.

The scheme is that of :mod:`fast_attention.linear.chunked.causal_chunk`: keys are absorbed into a
state on a running maximum per feature; inside a chunk every row sees the first key, read on the
scale of the state with that key, and later keys enter pair by pair with a factor of their own. No
maximum looks past its row.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal_chunk import LARGEST_EXPONENT
from fast_attention.linear.chunked.wide_pairs import HEADROOM, pair_limit
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
    Sources,
    State,
    absorb,
    fetch_state_vectors,
    first_decay,
    start_state,
    state_shapes,
)
from fast_attention.linear.pallas_gpu.tiles import (
    TILE,
    Tiles,
    spread_columns,
    spread_rows,
)
from fast_attention.linear.state import EMPTY_LOG_SCALE, MASKED_LOG
from fast_attention.linear.types import safe_inverse


class Result(NamedTuple):
    """What a forward kernel returns.

    Attributes:
      numerator: ``[B, T, H, V]``; divided if there is a division.
      denominator: ``[B, H, T]``.
      state: after the last key, for every query head.
      maxima: for the backward pass; those of a bidirectional call are the row maxima alone.
      wide: 1 where a row has a pair of :mod:`fast_attention.linear.chunked.wide_pairs`, which
        kernels lose, else 0, ``[B, H, T]``; None if bidirectional.
      any_wide: the largest of each program's rows, by their place in a chunk, ``[B, H, C]``.
    """

    numerator: Any
    denominator: Any
    state: State
    maxima: Maxima
    wide: Any = None
    any_wide: Any = None


def absorb_keys(sizes: Sizes, operands: Operands) -> State:
    """Computes the state of the keys of each row and key head.

    Args:
      sizes: of the call.
      operands: arrays, padded; queries are not read.
    """
    outputs = state_shapes(sizes.batch, sizes.heads, sizes.features, sizes.value_dim)

    def body(tiles: Tiles, operands: Any, out: State, shared: dict[str, Any]) -> None:
        program = Program(tiles, sizes, operands, shared)
        start_state(program, Sources(None, None), out, causal=False)
        loop(tiles, sizes.keys // TILE, lambda chunk, _: _absorb_chunk(program, out, chunk))

    return launch(body, sizes, operands, outputs, forward_memory(sizes, len(operands.key)))


def forward(sizes: Sizes, operands: Operands, sources: Sources, *, causal: bool) -> Result:
    """Computes attention.

    Args:
      sizes: of the call.
      operands: arrays, padded; keys are read only if causal.
      sources: of the state before the first key, or with all keys.
      causal: position t sees keys 0..t.
    """
    head = (sizes.batch, sizes.heads)
    chunks, features = sizes.queries // TILE, sizes.features
    rows = float32(*head, sizes.queries)
    dtype = sizes.division.dtype if sizes.division else jnp.float32
    shape = sizes.batch, sizes.queries, sizes.heads, sizes.value_dim
    outputs = Result(
        numerator=jax.ShapeDtypeStruct(shape, dtype),
        denominator=rows,
        state=state_shapes(*head, features, sizes.value_dim),
        maxima=Maxima(rows),
    )
    if causal:
        scales = float32(*head, chunks + 1, features), float32(*head, chunks, features)
        outputs = outputs._replace(
            maxima=Maxima(rows, rows, rows, *scales), wide=rows, any_wide=float32(*head, TILE)
        )

    def body(tiles: Tiles, inputs: Any, out: Result, shared: dict[str, Any]) -> None:
        operands, sources = inputs
        program = Program(tiles, sizes, operands, shared)
        start_state(program, sources, out.state, causal=causal)
        if not causal:
            loop(tiles, chunks, lambda chunk, _: _read_chunk(program, out, chunk))
            return
        _save_first_scales(program, out)
        any_wide = loop(
            tiles,
            chunks,
            lambda chunk, wide: jnp.maximum(wide, _causal_chunk(program, out, chunk)),
            tiles.full_rows(0.0),
        )
        shared["wide"][...] = any_wide
        tiles.send((shared["wide"], out.any_wide.at[program.batch, program.head]))

    if not causal:
        operands = operands._replace(key=(), value=(), key_log=None)
    parts = len(operands.query)
    return launch(body, sizes, (operands, sources), outputs, forward_memory(sizes, parts))


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
        "wide": TILE,
        "denominator": TILE,
        "scale": TILE,
        "next_scale": TILE,
        "first": TILE,
        "k_sum": TILE,
    }


def _save_first_scales(program: Program, out: Result) -> None:
    """Copies the scales of the state that the program starts from."""
    tiles, shared, b, h = program.tiles, program.shared, program.batch, program.head

    def body(tile: Array, _: Any) -> None:
        tiles.fetch((out.state.log_scale.at[b, h, piece(tile)], shared["scale"]))
        tiles.send((shared["scale"], out.maxima.scales.at[b, h, 0, piece(tile)]))

    program.over_tiles(body)


def _causal_chunk(program: Program, out: Result, chunk: Array) -> Array:
    """Computes a chunk of rows, and its keys' part of the state; returns which rows are wide."""
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, operands, maxima = program.batch, program.head, program.operands, out.maxima
    tiles.fetch(
        *program.queries(operands.query, "query", chunk),
        *program.keys(operands.key, "key", chunk),
        *program.keys(operands.value, "value", chunk),
        program.key_log_copy(chunk),
    )

    row_max, key_max, seen = _find_maxima(program, out, chunk)
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
        tiles.send((shared["next_scale"], maxima.scales.at[b, h, chunk + 1, piece(tile)]))
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
    # Rows read the first key of a chunk on the scale of the state with it.
    key_max = jnp.max(jnp.where(pairs & later, shift + HEADROOM, MASKED_LOG), axis=1)
    wide = jnp.where(key_max - pair_max > pair_limit(jnp.dtype(jnp.float32)), 1.0, 0.0)
    weights = products * jnp.exp(jnp.minimum(shift - spread_rows(pair_max), LARGEST_EXPONENT))
    weights = jnp.where(pairs & (products > 0), weights, 0.0)
    gain = jnp.exp(past - pair_max)
    tiles.store(shared["pairs"], weights)
    numerator = numerator * spread_rows(gain, sizes.value_dim)
    numerator = tiles.matmul(shared["pairs"], shared["value"], order=sizes.parts, add=numerator)
    denominator = denominator * gain + jnp.sum(weights, axis=1)
    shared["denominator"][...] = denominator
    shared["pair_max"][...] = pair_max
    shared["wide"][...] = wide
    here = piece(chunk)
    tiles.send(
        (shared["denominator"], out.denominator.at[b, h, here]),
        (shared["row_max"], maxima.row_max.at[b, h, here]),
        (shared["pair_max"], maxima.pair_max.at[b, h, here]),
        (shared["key_shift"], maxima.key_shift.at[b, h, here]),
        (shared["wide"], out.wide.at[b, h, here]),
    )
    _write(program, out, here, numerator, denominator)
    return wide


def _find_maxima(program: Program, out: Result, chunk: Array) -> tuple[Array, Array, Array]:
    """Saves the scales of the state with the first key of a chunk.

    Returns:
      The largest exponent of each query and of each key on these scales, and the largest scale,
      ``[64]``.
    """
    tiles, shared = program.tiles, program.shared
    b, h, maxima = program.batch, program.head, out.maxima

    def body(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
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
    return program.over_tiles(body, (lowest, lowest, lowest))


def _absorb_chunk(program: Program, state: State, chunk: Array) -> None:
    b, h, operands, tiles = program.batch, program.head, program.operands, program.tiles
    tiles.fetch(
        *program.keys(operands.key, "key", chunk),
        *program.keys(operands.value, "value", chunk),
        program.key_log_copy(chunk),
    )

    def absorb_tile(tile: Array, _: Any) -> None:
        program.fetch_weights(tile)
        fetch_state_vectors(program, state, tile)
        program.read_matrix(state.kv.at[b, h, piece(tile)])
        absorb(program, state, tile)

    program.over_tiles(absorb_tile)


def _read_chunk(program: Program, out: Result, chunk: Array) -> None:
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, operands = program.batch, program.head, program.operands
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
    _write(program, out, here, numerator, denominator)


def _write(program: Program, out: Result, here: Any, numerator: Array, denominator: Array) -> None:
    division, width = program.sizes.division, program.sizes.value_dim
    destination = out.numerator.at[program.batch, here, program.head]
    if division is not None:
        numerator = numerator * spread_rows(safe_inverse(denominator, division.epsilon), width)
    program.write_rounded(destination, numerator, "state")
