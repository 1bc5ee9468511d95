"""Gradients of one block, shared by the causal and the bidirectional backward kernels.

Numerator and denominator of a row nearly cancel in the gradient of its features: there states are
multiplied in two bfloat16 parts, and what belongs to denominators is added in float32.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.operands import (
    Operands,
    Place,
    float32,
    head_spec,
    key_spec,
    like,
    query_spec,
)
from fast_attention.linear.pallas_tpu.program import NN, NT, Program


class Rows(NamedTuple):
    """A chunk of queries of one head, and the cotangents of its rows.

    Attributes:
      query: ``[D, C]``.
      features: ``[C, M]``.
      before: what elementwise features are a function of, ``[C, M]``; else None.
      numerator: cotangent, ``[V, C]``, float32 numbers of the operands' precision.
      denominator: cotangent, ``[1, C]``, float32.
    """

    query: Array
    features: Array
    before: Array | None
    numerator: Array
    denominator: Array


class Keys(NamedTuple):
    """A chunk of keys of one head.

    Attributes:
      key: ``[D, C]``.
      value: ``[V, C]``.
      features: ``[C, M]``.
      before: as of :class:`Rows`.
      seen: keys that are not masked, ``[C, 1]``, where their features do not show it; None for all.
    """

    key: Array
    value: Array
    features: Array
    before: Array | None
    seen: Array | None


class Given(NamedTuple):
    """What the backward kernels read beside the operands; refs or arrays.

    Attributes:
      out: ``[B H, V, T]``.
      d_out: the same.
      denominator: ``[B H, 1, T]``.
      d_kv: cotangent of the final state, ``[B K, V + 16, M]``; None for 0.
    """

    out: Any
    d_out: Any
    denominator: Any
    d_kv: Any


class Gradients(NamedTuple):
    """What the backward kernels return; None where it is not asked for.

    Attributes:
      query: ``[B H, D, T]``.
      key: ``[B K, D, S]``.
      value: ``[B K, V, S]``.
      key_log: ``[B K, 1, S]``.
      kv: of the state before, ``[B K, V + 16, M]``.
      query_weights: ``[B K, D + 16, M]``, row D of the offset.
      key_weights: the same.
      decay: see :class:`.causal_pull_back.Pulled`, ``[B K, 2, S]``.
    """

    query: Any
    key: Any
    value: Any
    key_log: Any
    kv: Any
    query_weights: Any
    key_weights: Any
    decay: Any


def gradient_specs(
    program: Program, operands: Operands, query_place: Place, key_place: Place, *, weights: bool
) -> tuple[Gradients, Gradients]:
    """Returns what a backward kernel allocates, and the blocks it writes.

    Args:
      program: choices.
      operands: of the forward pass.
      query_place: from the second index of the grid to the block of queries.
      key_place: the same for keys.
      weights: gradients of weights and offsets; else all others.
    """
    d, none = program.head_dim, Gradients(*[None] * 8)
    if weights:
        both = float32(operands.key.shape[0], d + pr.EXTRA, program.padded_features)
        spec = head_spec(program, d + pr.EXTRA)
        return (
            none._replace(query_weights=both, key_weights=both),
            none._replace(query_weights=spec, key_weights=spec),
        )
    shapes = none._replace(
        query=like(operands.query), key=like(operands.key), value=like(operands.value)
    )
    specs = none._replace(
        query=query_spec(program, d, query_place),
        key=key_spec(program, d, key_place),
        value=key_spec(program, program.value_dim, key_place),
    )
    if operands.key_log is not None:
        shapes = shapes._replace(key_log=like(operands.key_log))
        specs = specs._replace(key_log=key_spec(program, 1, key_place))
    if operands.decay is not None:
        heads, _, keys = operands.decay.shape
        shapes = shapes._replace(decay=float32(heads, 2, keys))
        specs = specs._replace(decay=key_spec(program, 2, key_place))
    if operands.kv is not None:
        shapes = shapes._replace(kv=like(operands.kv))
        specs = specs._replace(kv=head_spec(program, program.value_dim + pr.EXTRA))
    return shapes, specs


def given_specs(program: Program, given: Given, place: Place) -> Given:
    """Returns the blocks of results and cotangents that a backward kernel reads."""
    row = query_spec(program, program.value_dim, place)
    state = head_spec(program, program.value_dim + pr.EXTRA)
    return Given(
        out=row,
        d_out=row,
        denominator=query_spec(program, 1, place),
        d_kv=None if given.d_kv is None else state,
    )


def start(given: Given, results: Gradients, d_kv_ref: Any) -> None:
    """Sets the cotangents of a program's states to those of the final ones, and sums to 0."""
    d_kv_ref[...] = jnp.zeros_like(d_kv_ref) if given.d_kv is None else given.d_kv[...]
    for ref in (results.query_weights, results.key_weights):
        if ref is not None:
            ref[...] = jnp.zeros_like(ref)


def load_rows(
    program: Program,
    operands: Operands,
    given: Given,
    place: tuple[Any, int, slice],
    scale: Array,
    valid: Array | None,
) -> Rows:
    """Makes the features of a chunk of queries and divides the cotangents of its rows.

    Args:
      program: choices.
      operands: refs.
      given: refs.
      place: key head, which of its query heads, and piece of the block.
      scale: of the state, ``[1, M]``.
      valid: rows that count, ``[1, C]``; None for all.
    """
    h, g, piece = place
    head = h * program.groups + g
    query = pr.where(valid, operands.query[head, :, piece])
    weights, offset = operands.of_queries(h)
    features, before = pr.query_features(program, query, weights, scale + offset)
    out = pr.where(valid, given.out[head, :, piece]).astype(jnp.float32)
    d_out = pr.where(valid, given.d_out[head, :, piece]).astype(jnp.float32)
    denominator = pr.where(valid, given.denominator[head, :, piece])
    numerator = d_out * pr.inverse(program, denominator)
    numerator = pr.rounded(numerator) if program.low else numerator
    if program.denominator_epsilon:
        d_denominator = jnp.sum(d_out * out, axis=0, keepdims=True)
        d_denominator = d_denominator * pr.inverse_slope(program, denominator)
    else:
        # Of the numerator as it is rounded, so that both cancel as they should.
        d_denominator = -jnp.sum(numerator * out, axis=0, keepdims=True)
    return Rows(query, features, before, numerator, d_denominator)


def load_keys(
    program: Program,
    operands: Operands,
    place: tuple[Any, slice],
    scale: Array,
    start: Array,
    stop: Array | None = None,
    shift: Array | None = None,
) -> Keys:
    """Makes the features of a chunk of keys; those from position ``stop`` of the block on are 0.

    ``shift`` is as in :func:`.program.load_keys`.
    """
    h, piece = place
    key, value, constants = pr.load_keys(program, operands, h, piece, start, shift)
    weights, offset = operands.of_keys(h)
    before = pr.key_pre_features(program, key, weights, scale - offset, constants)
    features = pr.key_features(program, before, constants)
    if stop is not None:
        at = jax.lax.broadcasted_iota(jnp.int32, (program.chunk, 1), 0) + piece.start
        features = jnp.where(at < stop, features, 0)
    value = value.astype(program.operand)
    if program.exponential:
        return Keys(key, value, features, None, None)
    seen = None if constants is None else constants > 0.5 * pr.MASKED
    return Keys(key, value, features, before, seen)


def read_gradient(program: Program, rows: Rows, kv: Array) -> Array:
    """Returns the cotangent of a chunk's query features from the state they read, ``[C, M]``.

    Args:
      program: choices.
      rows: the chunk.
      kv: the state, ``[V + 16, M]``.
    """
    v = program.value_dim
    left = pr.transpose(pr.twice(program, rows.numerator))
    cotangent = pr.product(program, left, pr.both_parts(program, kv[:v]), NN)
    return cotangent + pr.transpose(rows.denominator) * kv[v : v + 1]


def pull_back_rows(
    program: Program, rows: Rows, read: Array, keys: Keys | None, d_pairs: Array | None
) -> Array:
    """Returns the cotangent of what a chunk's query features are a function of, ``[C, M]``.

    Args:
      program: choices.
      rows: the chunk.
      read: from :func:`read_gradient`.
      keys: those it sees besides; None for none.
      d_pairs: cotangent of their weights, queries first, ``[C, C]``.
    """
    cotangent = read
    if keys is not None and d_pairs is not None:
        cotangent = cotangent + pr.product(program, d_pairs, keys.features, NN)
    return pr.through_features(program, rows.features, rows.before, cotangent)


def kept_gradient(program: Program, keys: Keys, d_kv: Array) -> Array:
    """Returns the cotangent of a chunk's key features from the state they enter, ``[C, M]``.

    Args:
      program: choices.
      keys: the chunk.
      d_kv: cotangent of the state, ``[V + 16, M]``.
    """
    v = program.value_dim
    left = pr.transpose(pr.twice(program, keys.value))
    cotangent = pr.product(program, left, pr.both_parts(program, d_kv[:v]), NN)
    return cotangent + jnp.sum(d_kv[v:], axis=0, keepdims=True)


def pull_back_keys(
    program: Program, keys: Keys, kept: Array, pairs: list[tuple[Rows, Array]]
) -> Array:
    """Returns the cotangent of what a chunk's key features are a function of, ``[C, M]``.

    Args:
      program: choices.
      keys: the chunk.
      kept: from :func:`kept_gradient`.
      pairs: rows that see them besides, and the cotangent of the weights, keys first, ``[C, C]``.
    """
    cotangent = kept
    for rows, d_pairs in pairs:
        cotangent = cotangent + pr.product(program, d_pairs, rows.features, NN)
    cotangent = pr.through_features(program, keys.features, keys.before, cotangent)
    return pr.where(keys.seen, cotangent)


def state_gradient(program: Program, rows: Rows, factor: Array | None = None) -> Array:
    """Returns the cotangent of the state that a chunk reads, ``[V + 16, M]``.

    That of the sums of features is the sum of the rows from V on.

    Args:
      program: choices.
      rows: the chunk.
      factor: on the state as rows read it, ``[C, 1]``; None for 1.
    """
    parts, rest = [], rows.denominator
    for _ in range(3 if program.low else 1):
        parts.append(pr.rounded(rest) if program.low else rest)
        rest = rest - parts[-1]
    at = jax.lax.broadcasted_iota(jnp.int32, (pr.EXTRA, program.chunk), 0)
    below = jnp.zeros(at.shape, jnp.float32)
    for i, part in enumerate(parts):
        below = jnp.where(at == i, part, below)
    left = jnp.concatenate([rows.numerator, below], axis=0)
    # Numerators and denominators must be rounded alike: the factor is one of features.
    features = rows.features if factor is None else rows.features * factor
    return pr.product(program, left, features, NN)


def input_gradient(
    program: Program, weights: Array, cotangent: Array, x: Array | None = None
) -> tuple[Array, Array | None]:
    """Returns the gradient of queries or keys, ``[D, C]``, and of the log of a whole key.

    Args:
      program: choices.
      weights: as in :func:`.program.pre_features`.
      cotangent: ``[C, M]``.
      x: keys, ``[D, C]``; None for queries.
    """
    d = program.head_dim
    left = weights[:d]
    if x is None:
        return pr.product(program, left, cotangent, NT) * _unit(program), None
    both = pr.product(program, pr.with_ones(program, left), cotangent, NT) * _unit(program)
    gradient, d_log = both[:d], both[d : d + 1]
    if program.norm:
        gradient = gradient - (2 * program.norm) * x.astype(jnp.float32) * d_log
    return gradient, d_log


def weight_gradient(program: Program, x: Array, cotangent: Array) -> Array:
    """Returns the gradient of weights and offset, ``[D + 16, M]``."""
    return pr.product(program, pr.with_ones(program, x), cotangent, NN) * _unit(program)


def _unit(program: Program) -> float:
    # Exponentials are to base 2.
    return math.log(2) if program.exponential else 1.0
