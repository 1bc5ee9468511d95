"""Gradients of keys and values, and of the projection through keys.

The causal kernel walks back and carries the cotangent of the state. Matrices of pairs have keys as
rows here. Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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
    Ref,
    Sizes,
    float32,
    launch,
    loop,
    piece,
    visible_scale,
)
from fast_attention.linear.pallas_gpu.state import State, start_cotangent
from fast_attention.linear.pallas_gpu.tiles import (
    TILE,
    Tiles,
    spread_columns,
    spread_rows,
)


class KeyGradients(NamedTuple):
    """What a kernel returns, for every head that it walks over.

    Attributes:
      key: ``[B, S, H, D]``.
      value: ``[B, S, H, V]``.
      key_log: ``[B, H, S]``.
      weights: ``[B, H, M, D]``.
      state: cotangent of the state before the first key (without a scale); if not causal, as given.
        None if it is not needed.
    """

    key: Any
    value: Any
    key_log: Any
    weights: Any
    state: State | None


def key_gradients(
    sizes: Sizes, given: Given, *, causal: bool, others: KeyGradients | None = None
) -> KeyGradients:
    """Computes the gradients; see :class:`KeyGradients`.

    Args:
      sizes: of the call.
      given: what the kernel reads.
      causal: position t sees keys 0..t.
      others: to add to, all but the state.
    """
    head = (sizes.batch, sizes.heads)
    last_to_add = not causal or (sizes.segments == 1 and sizes.groups == 1)
    dtype = sizes.gradient_dtype if last_to_add else jnp.float32
    shape = sizes.batch, sizes.keys, sizes.heads
    outputs = KeyGradients(
        key=jax.ShapeDtypeStruct((*shape, sizes.head_dim), dtype),
        value=jax.ShapeDtypeStruct((*shape, sizes.value_dim), dtype),
        key_log=float32(*head, sizes.keys),
        weights=float32(*head, sizes.features, sizes.head_dim),
        state=State(
            float32(*head, sizes.features, sizes.value_dim), float32(*head, sizes.features), None
        ),
    )

    def body(tiles: Tiles, inputs: Any, out: KeyGradients, shared: dict[str, Any]) -> None:
        given, others = inputs
        program = Program(tiles, sizes, given.operands, shared)
        start_weights(program, None if others is None else others.weights, out.weights)
        assert out.state is not None
        start_cotangent(program, given.cotangents.state, out.state)
        last = sizes.keys // TILE - 1

        def chunk(i: Array, _: Any) -> None:
            if causal:
                _causal_chunk(program, given, out, last - i)
            else:
                _bidirectional_chunk(program, given, others, out, last - i)

        loop(tiles, last + 1, chunk)

    memory = backward_memory(sizes, len(given.operands.key))
    return launch(body, sizes, (given, others), outputs, memory)


Gradients = tuple[Array, Array, Array]
"""Of keys ``[64, D]``, values ``[64, V]`` and what is added to their logs ``[64]``."""


def _causal_chunk(program: Program, given: Given, out: KeyGradients, chunk: Array) -> None:
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, maxima, state = program.batch, program.head, given.maxima, out.state
    assert maxima is not None and state is not None
    tiles.fetch(*row_copies(program, given, chunk), *key_copies(program, given, chunk))

    # Registers are scarce: vectors are loaded where they are used.
    def rows(name: str) -> Array:
        return spread_rows(tiles.rows(shared[name]))

    def visible_first() -> Array:
        return spread_columns(visible_scale(tiles.columns(shared["first"])))

    def query_features(tile: Array) -> Array:
        return jnp.exp(program.query_logs(tile) + visible_first() - rows("row_max"))

    def key_features(tile: Array) -> Array:
        return jnp.exp(program.key_logs(tile) - visible_first() - rows("key_shift"))

    def fetch(tile: Array) -> None:
        program.fetch_weights(tile)
        tiles.fetch((maxima.first_scales.at[b, h, chunk, piece(tile)], shared["first"]))

    def multiply(tile: Array, products: Array) -> Array:
        fetch(tile)
        tiles.store(shared["pairs"], key_features(tile))
        tiles.store(shared["features"], query_features(tile))
        return tiles.matmul(shared["pairs"], shared["features"], transpose_right=True, add=products)

    keys_at, queries_at = tiles.positions(chunk)
    products = program.over_tiles(multiply, tiles.full(0.0, TILE))
    factor = pair_factor(
        rows("key_shift"),
        spread_columns(tiles.columns(shared["pair_max"])),
        keys_at <= queries_at,
    )
    tiles.store(shared["features"], jnp.where(products > 0.0, products * factor, 0.0))
    d_value = tiles.matmul(shared["features"], shared["numerator"])
    d_pairs = tiles.matmul(
        shared["value"], shared["numerator"], transpose_right=True, order=sizes.parts
    )
    d_pairs = (d_pairs + spread_columns(tiles.columns(shared["denominator"]))) * factor
    tiles.store(shared["pairs"], d_pairs)

    def body(tile: Array, gradients: Gradients) -> Gradients:
        _fetch_cotangent(program, out, tile)
        fetch(tile)
        tiles.store(shared["features"], query_features(tile))
        d_keys = tiles.matmul(shared["pairs"], shared["features"])
        d_logs = through_exp(key_features(tile), d_keys)
        # Registers are scarce.
        stash = shared["stage"].at[:, pl.ds(0, TILE)]
        stash[...] = d_logs
        tiles.fetch(
            (maxima.scales.at[b, h, chunk, piece(tile)], shared["scale"]),
            (maxima.scales.at[b, h, chunk + 1, piece(tile)], shared["next_scale"]),
        )
        gradients = _pull_back_absorbed(program, out, tile, stash, gradients)

        # Back to the state before the chunk, and what its rows read from it.
        queries = query_features(tile) * spread_rows(gain_of(tiles.rows(shared["pair_max"])))
        tiles.store(shared["features"], queries)
        scale = tiles.columns(shared["scale"])
        d_k_sum = tiles.columns(shared["k_sum"])
        d_k_sum = d_k_sum * jnp.exp(scale - tiles.columns(shared["next_scale"]))
        d_read_sum = jnp.sum(queries * rows("denominator"), axis=0)
        d_k_sum = d_k_sum + d_read_sum * jnp.exp(scale - tiles.columns(shared["first"]))
        shared["k_sum"][...] = d_k_sum
        d_read = tiles.matmul(shared["features"], shared["numerator"], transpose_left=True)
        read = jnp.exp(tiles.rows(shared["scale"]) - tiles.rows(shared["first"]))
        d_read = d_read * spread_rows(read, sizes.value_dim)
        decay = jnp.exp(tiles.rows(shared["scale"]) - tiles.rows(shared["next_scale"]))
        d_kv = program.read_matrix(state.kv.at[b, h, piece(tile)])
        d_kv = d_kv * spread_rows(decay, sizes.value_dim) + d_read
        program.write_matrix(state.kv.at[b, h, piece(tile)], d_kv)
        tiles.send((shared["k_sum"], state.k_sum.at[b, h, piece(tile)]))
        return gradients

    start = (tiles.full(0.0, sizes.head_dim), d_value, tiles.full_rows(0.0))
    _write(program, out, chunk, program.over_tiles(body, start))


def _bidirectional_chunk(
    program: Program, given: Given, others: KeyGradients | None, out: KeyGradients, chunk: Array
) -> None:
    tiles, shared, sizes = program.tiles, program.shared, program.sizes
    b, h, state = program.batch, program.head, given.state
    assert state is not None
    tiles.fetch(*key_copies(program, given, chunk))

    def body(tile: Array, gradients: Gradients) -> Gradients:
        program.fetch_weights(tile)
        # The scale of the final state is an upper bound for every key: nothing overflows.
        tiles.fetch((state.log_scale.at[b, h, piece(tile)], shared["next_scale"]))
        _fetch_cotangent(program, out, tile)
        return _pull_back_absorbed(program, out, tile, None, gradients)

    if others is None:
        zeros = tiles.full(0.0, sizes.head_dim), tiles.full(0.0, sizes.value_dim)
        start = (*zeros, tiles.full_rows(0.0))
    else:
        start = _fetch_gradients(program, others, chunk)
    _write(program, out, chunk, program.over_tiles(body, start))


def _pull_back_absorbed(
    program: Program, out: KeyGradients, tile: Array, d_logs: Ref | None, gradients: Gradients
) -> Gradients:
    """Pulls the cotangent of the state after a chunk back to its keys and values.

    Leaves the cotangent of ``k_sum`` in shared memory.

    Args:
      program: with the tile's weights and the scale after the chunk in shared memory.
      out: whose state is the cotangent.
      tile: of features.
      d_logs: cotangent of the log-features of keys by other ways, ``[64, 64]``.
      gradients: so far.
    """
    tiles, shared, parts = program.tiles, program.shared, program.sizes.parts
    d_key, d_value, d_key_log = gradients
    scale = spread_columns(tiles.columns(shared["next_scale"]))
    keys = jnp.exp(program.key_logs(tile) - scale)
    tiles.store(shared["features"], keys)
    d_value = tiles.matmul(shared["features"], shared["state"], add=d_value)
    d_keys = tiles.matmul(shared["value"], shared["state"], transpose_right=True, order=parts)
    d_k_sum = spread_columns(tiles.columns(shared["k_sum"]))
    total = through_exp(keys, d_keys + d_k_sum)
    if d_logs is not None:
        total = total + tiles.matrix(d_logs)
    d_key_log = d_key_log + jnp.sum(total, axis=1)
    d_key = pull_back_logs(program, total, "key", tile, d_key, out.weights)
    return d_key, d_value, d_key_log


def _fetch_cotangent(program: Program, out: KeyGradients, tile: Array) -> None:
    b, h, here = program.batch, program.head, piece(tile)
    assert out.state is not None
    program.tiles.fetch((out.state.k_sum.at[b, h, here], program.shared["k_sum"]))
    program.tiles.store(program.shared["state"], program.read_matrix(out.state.kv.at[b, h, here]))


def _fetch_gradients(program: Program, others: KeyGradients, chunk: Array) -> Gradients:
    b, h, here, stage = program.batch, program.head, piece(chunk), program.shared["next_scale"]
    d_key = program.read_matrix(others.key.at[b, here, h])
    d_value = program.read_matrix(others.value.at[b, here, h])
    program.tiles.fetch((others.key_log.at[b, h, here], stage))
    return d_key, d_value, program.tiles.rows(stage)


def _write(program: Program, out: KeyGradients, chunk: Array, gradients: Gradients) -> None:
    d_key, d_value, d_key_log = gradients
    b, h, here = program.batch, program.head, piece(chunk)
    program.write_rounded(out.key.at[b, here, h], d_key, "key")
    program.write_rounded(out.value.at[b, here, h], d_value, "value")
    program.shared["key_log"][...] = d_key_log
    program.tiles.send((program.shared["key_log"], out.key_log.at[b, h, here]))
