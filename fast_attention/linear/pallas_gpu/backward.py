"""What the backward kernels share, and the launch of both.

Gradients of queries walk forward with the state, those of keys and values walk back with the
state's cotangent; so no state is saved for a chunk and no prefix is rebuilt by subtraction.
Features are made again, with the maxima that the forward pass found.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal_chunk import LARGEST_EXPONENT
from fast_attention.linear.pallas_gpu.program import Operands, Program, Ref, Sizes, piece
from fast_attention.linear.pallas_gpu.state import Maxima, Sources, State
from fast_attention.linear.pallas_gpu.tiles import TILE


class Cotangents(NamedTuple):
    """What comes back for the results, and for the state of every query head.

    Attributes:
      numerator: parts of ``[B, T, H, V]``.
      denominator: ``[B, H, T]``.
      state: without a scale; None if it is zero.
    """

    numerator: Any
    denominator: Any
    state: State | None


class Given(NamedTuple):
    """What a backward kernel reads.

    Attributes:
      operands: as given to the forward kernel.
      state: with all keys, of every query head; None if causal.
      sources: of the state before the first key; None if not causal.
      maxima: what the forward pass found.
      cotangents: of its results.
    """

    operands: Operands
    state: State | None
    sources: Sources | None
    maxima: Maxima | None
    cotangents: Cotangents


def backward_memory(sizes: Sizes, input_parts: int) -> dict[str, tuple[int, int] | int]:
    """Returns the shared memory of the backward kernels by name."""
    value_parts = 1 if input_parts == 1 else sizes.parts
    names = {
        "query": (input_parts, sizes.head_dim),
        "key": (input_parts, sizes.head_dim),
        "value": (value_parts, sizes.value_dim),
        "numerator": (sizes.parts, sizes.value_dim),
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
    if sizes.head_dim != sizes.value_dim:
        names["head_stage"] = (0, sizes.head_dim)
    return names


def row_copies(program: Program, given: Given, chunk: Array) -> list[tuple[Ref, Ref]]:
    """Returns the copies of a chunk's queries and of what belongs to its rows."""
    b, h, here, shared = program.batch, program.head, piece(chunk), program.shared
    assert given.maxima is not None
    copies = [
        *program.queries(given.operands.query, "query", chunk),
        *program.queries(given.cotangents.numerator, "numerator", chunk),
        (given.cotangents.denominator.at[b, h, here], shared["denominator"]),
        (given.maxima.row_max.at[b, h, here], shared["row_max"]),
    ]
    if given.maxima.pair_max is not None:
        copies.append((given.maxima.pair_max.at[b, h, here], shared["pair_max"]))
    return copies


def key_copies(program: Program, given: Given, chunk: Array) -> list[tuple[Ref, Ref]]:
    """Returns the copies of a chunk's keys and values and of what belongs to them."""
    b, h, here, shared = program.batch, program.head, piece(chunk), program.shared
    copies = [
        *program.keys(given.operands.key, "key", chunk),
        *program.keys(given.operands.value, "value", chunk),
        program.key_log_copy(chunk),
    ]
    if given.maxima is not None and given.maxima.key_shift is not None:
        copies.append((given.maxima.key_shift.at[b, h, here], shared["key_shift"]))
    return copies


def gain_of(pair_max: Array) -> Array:
    """Returns the factor on what a row reads from the state; at most 1, also if that is empty."""
    return jnp.exp(jnp.minimum(-pair_max, 0.0))


def pair_factor(key_shift: Array, pair_max: Array, visible: Array) -> Array:
    """Returns weights over products of features, 0 where a key is not seen; all ``[64, 64]``."""
    factor = jnp.exp(jnp.minimum(key_shift - pair_max, LARGEST_EXPONENT))
    return jnp.where(visible, factor, 0.0)


def through_exp(features: Array, cotangent: Array) -> Array:
    """Returns the cotangent of the logs; a feature that underflowed has none."""
    return jnp.where(features > 0.0, features * cotangent, 0.0)


def start_weights(program: Program, others: Ref | None, d_weights: Ref) -> None:
    """Sets a program's gradient of the projection to 0, or to the one to add to."""

    def body(tile: Array, _: Any) -> None:
        place = _place(program, tile)
        if others is None:
            start = program.tiles.full(0.0, program.sizes.head_dim)
        else:
            start = program.read_matrix(others.at[place])
        program.write_matrix(d_weights.at[place], start)

    program.over_tiles(body)


def pull_back_logs(
    program: Program, d_logs: Array, x: str, tile: Array, d_x: Array, d_weights: Ref
) -> Array:
    """Adds the gradients of ``logs = x @ weights^T``.

    Args:
      program: with the tile's weights and ``x`` in shared memory.
      d_logs: ``[64, 64]``.
      x: name of the operand.
      tile: of features.
      d_x: the gradient of x so far, ``[64, D]``.
      d_weights: ``[B, H, M, D]``, added to.

    Returns:
      The gradient of x, with this tile.
    """
    tiles, shared, parts = program.tiles, program.shared, program.sizes.parts
    tiles.store(shared["features"], d_logs)
    d_x = tiles.matmul(shared["features"], shared["weights"], order=parts, add=d_x)
    place = d_weights.at[_place(program, tile)]
    before = program.read_matrix(place)
    added = tiles.matmul(
        shared["features"], shared[x], transpose_left=True, order=parts, add=before
    )
    program.write_matrix(place, added)
    return d_x


def _place(program: Program, tile: Array) -> tuple[Any, ...]:
    return program.batch, program.head, piece(tile)
