"""The state in the GPU kernels: tiles of 64 features in global memory, changed where they lie.

A program works on a state of its own, in its outputs; what it needs of a tile is brought to shared
memory and sent back. Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_gpu.program import Program, float32, piece
from fast_attention.linear.pallas_gpu.tiles import spread_columns, spread_rows
from fast_attention.linear.state import EMPTY_LOG_SCALE


class State(NamedTuple):
    """A linear attention state, features first: ``[B, K or H, M, V]`` and twice ``[.., M]``."""

    kv: Any
    k_sum: Any
    log_scale: Any


class Maxima(NamedTuple):
    """What the forward pass found out and the backward pass repeats with.

    Attributes:
      row_max: largest log-feature of each query on the scale it reads, ``[B, H, T]``.
      pair_max: largest weight of each row in units of it, ``[B, H, T]``.
      key_shift: what is taken out of each key's log-features in its chunk, ``[B, H, S]``.
      scales: of the state before each chunk, and after the last one, ``[B, H, N + 1, M]``.
      first_scales: of the state with each chunk's first key, ``[B, H, N, M]``.
    """

    row_max: Any
    pair_max: Any = None
    key_shift: Any = None
    scales: Any = None
    first_scales: Any = None


class Sources(NamedTuple):
    """The states that make up the one before a segment, or with all segments.

    Attributes:
      initial: before the first key, ``[B / segments, K, ...]``, or None if it is empty.
      own: of the keys of each segment, ``[B, K, ...]``; None if there is one segment.
    """

    initial: State | None
    own: State | None


def state_shapes(batch: int, heads: int, features: int, value_dim: int) -> State:
    """Returns shapes and dtypes of a state."""
    head = (batch, heads, features)
    return State(float32(*head, value_dim), float32(*head), float32(*head))


def start_state(program: Program, sources: Sources, destination: State, *, causal: bool) -> None:
    """Writes the state that a program starts from to where it works on its own.

    It is the sum of states on the largest of their scales: of the initial one and those of all
    segments, or of earlier segments if causal.
    """
    tiles, shared = program.tiles, program.shared
    initial, own = sources
    first = program.sequence * program.sizes.segments
    count = program.segment if causal else jnp.int32(program.sizes.segments)
    places = (shared["stage"], shared["k_sum"], shared["scale"])

    def fetch(state: State, row: Array, tile: Array) -> None:
        here = (row, program.key_head, piece(tile))
        tiles.fetch(*((x.at[here], y) for x, y in zip(state, places, strict=True)))

    def add_fetched(total: tuple[Array, Array]) -> tuple[Array, Array]:
        kv, k_sum = total
        factor = jnp.exp(tiles.columns(shared["scale"]) - tiles.columns(shared["next_scale"]))
        of_rows = jnp.exp(tiles.rows(shared["scale"]) - tiles.rows(shared["next_scale"]))
        kv = kv + tiles.matrix(shared["stage"]) * spread_rows(of_rows, program.sizes.value_dim)
        return kv, k_sum + tiles.columns(shared["k_sum"]) * factor

    def body(tile: Array, _: Any) -> None:
        def larger(state: State, row: Array, scale: Array) -> Array:
            tiles.fetch((state.log_scale.at[row, program.key_head, piece(tile)], shared["scale"]))
            return jnp.maximum(scale, tiles.columns(shared["scale"]))

        def add(state: State, row: Array, total: Any) -> Any:
            fetch(state, row, tile)
            return add_fetched(total)

        def over_sources(function: Any, carry: Any) -> Any:
            if initial is not None:
                carry = function(initial, program.sequence, carry)
            if own is None:
                return carry
            return jax.lax.fori_loop(0, count, lambda i, x: function(own, first + i, x), carry)

        shared["next_scale"][...] = over_sources(larger, tiles.full_columns(EMPTY_LOG_SCALE))
        zeros = tiles.full(0.0, program.sizes.value_dim), tiles.full_columns(0.0)
        kv, k_sum = over_sources(add, zeros)
        shared["k_sum"][...] = k_sum
        here = (program.batch, program.head, piece(tile))
        program.write_matrix(destination.kv.at[here], kv)
        tiles.send(
            (shared["k_sum"], destination.k_sum.at[here]),
            (shared["next_scale"], destination.log_scale.at[here]),
        )

    program.over_tiles(body)


def start_cotangent(program: Program, source: State | None, destination: State) -> None:
    """Copies the cotangent of a state, or zeros, to where the program adds to it."""
    tiles, shared = program.tiles, program.shared

    def body(tile: Array, _: Any) -> None:
        here = (program.batch, program.head, piece(tile))
        if source is None:
            shared["k_sum"][...] = tiles.full_columns(0.0)
            program.write_matrix(destination.kv.at[here], tiles.full(0.0, program.sizes.value_dim))
        else:
            tiles.fetch((source.k_sum.at[here], shared["k_sum"]))
            program.write_matrix(destination.kv.at[here], program.read_matrix(source.kv.at[here]))
        tiles.send((shared["k_sum"], destination.k_sum.at[here]))

    program.over_tiles(body)


def fetch_state_vectors(program: Program, state: State, tile: Array) -> None:
    """Brings a tile of the state's sums and scales to shared memory."""
    b, h, here = program.batch, program.head, piece(tile)
    program.tiles.fetch(
        (state.k_sum.at[b, h, here], program.shared["k_sum"]),
        (state.log_scale.at[b, h, here], program.shared["scale"]),
    )


def absorb(program: Program, state: State, tile: Array) -> None:
    """Adds the keys of a chunk to a tile of the state.

    The tile of ``kv`` before, ``[64, V]``, is what was read last. That and the log-features of the
    keys are made again rather than kept: registers are scarce.
    """
    tiles, shared = program.tiles, program.shared
    b, h, here = program.batch, program.head, piece(tile)
    scale, k_sum = tiles.columns(shared["scale"]), tiles.columns(shared["k_sum"])
    logs = program.key_logs(tile)
    next_scale = jnp.maximum(scale, jnp.max(logs, axis=0))
    features = jnp.exp(logs - spread_columns(next_scale))
    tiles.store(shared["features"], features)
    shared["next_scale"][...] = next_scale
    shared["k_sum"][...] = k_sum * jnp.exp(scale - next_scale) + jnp.sum(features, axis=0)
    decay = jnp.exp(tiles.rows(shared["scale"]) - tiles.rows(shared["next_scale"]))
    kv = tiles.matmul(
        shared["features"],
        shared["value"],
        transpose_left=True,
        order=program.sizes.parts,
        add=tiles.matrix(shared["stage"]) * spread_rows(decay, program.sizes.value_dim),
    )
    program.write_matrix(state.kv.at[b, h, here], kv)
    tiles.send(
        (shared["k_sum"], state.k_sum.at[b, h, here]),
        (shared["next_scale"], state.log_scale.at[b, h, here]),
    )


def first_decay(program: Program) -> Array:
    """Returns the factor ``[64, V]`` from a state's scale to that with the chunk's first key."""
    tiles, shared = program.tiles, program.shared
    decay = jnp.exp(tiles.rows(shared["scale"]) - tiles.rows(shared["first"]))
    return spread_rows(decay, program.sizes.value_dim)
