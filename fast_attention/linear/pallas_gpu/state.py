"""The state in the GPU kernels: tiles of 64 features in global memory, changed where they lie.

A program works on a state of its own, in its outputs; what it needs of a tile is brought to shared
memory and sent back. Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_gpu.program import Program, piece
from fast_attention.linear.pallas_gpu.tiles import spread_columns, spread_rows


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
      scales: of the state after each chunk, ``[B, H, N, M]``.
      first_scales: of the state with each chunk's first key, ``[B, H, N, M]``.
    """

    row_max: Any
    pair_max: Any
    key_shift: Any
    scales: Any
    first_scales: Any


def copy_state(program: Program, source: State, destination: State, head: Array) -> None:
    """Copies a head of a state (or its cotangent) to where the program works on its own."""
    tiles, stages = program.tiles, [program.shared[x] for x in ("stage", "k_sum", "scale")]

    def body(tile: Array, _: Any) -> None:
        b, h, here = program.batch, program.head, piece(tile)
        triples = list(zip(source, destination, stages, strict=True))
        tiles.fetch(*((x.at[b, head, here], y) for x, _, y in triples if x is not None))
        tiles.send(*((y, x.at[b, h, here]) for _, x, y in triples if x is not None))

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
