"""Gradients of one block of a causal call on one scale, from its last chunk to its first.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu import backward_block as bb
from fast_attention.linear.pallas_tpu import decay as dk
from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.backward_block import Given
from fast_attention.linear.pallas_tpu.operands import Operands
from fast_attention.linear.pallas_tpu.program import NN, NT, Program


class Pulled(NamedTuple):
    """Gradients of a block of one head, by query head and chunk, or of weights.

    Attributes:
      query: ``[D, C]`` by query head and chunk.
      key: ``[D, C]`` of each chunk.
      value: ``[V, C]`` of each chunk.
      key_log: ``[1, C]`` of each chunk.
      decay: ``[2, C]`` of each chunk. First, what rows read, times its cotangent, less what is read
        of the keys at the same positions; the last position has what is left of the state before
        the chunk in that after it, too. Second, what is left of keys in the state after the chunk.
      d_kv: ``[V + 16, M]``.
      query_weights: ``[D + 16, M]``.
      key_weights: the same.
    """

    query: dict[tuple[int, int], Array]
    key: list[Array]
    value: list[Array]
    key_log: list[Array]
    decay: list[Array]
    d_kv: Array
    query_weights: Array | None
    key_weights: Array | None


def pull_back_block(
    program: Program,
    operands: Operands,
    given: Given,
    heads: list[tuple[Any, Array, Array, Array]],
    start: Array,
    *,
    weights: bool,
    stretch: tuple[Array, Array] | None = None,
    since: dk.Since | None = None,
) -> list[Pulled]:
    """Pulls the cotangents of a block's rows, and of the state after it, back.

    Args:
      program: choices.
      operands: refs of a block.
      given: refs of it.
      heads: number, scale ``[1, M]``, the state before on it and the cotangent of the state after
        on it, ``[V + 16, M]``, of each head.
      start: position of the block in the sequence.
      weights: gradients of weights and offsets; else all others.
      stretch: rows of the block that count, from and to; None for all. Keys after it are left out.
      since: as in :func:`.causal_forward.attend_block`.
    """
    pieces = program.chunks()
    rows: dict[Any, bb.Rows] = {}
    keys: dict[Any, bb.Keys] = {}
    fading: dict[Any, dk.Factors | None] = {}
    for i, (h, scale, *_) in enumerate(heads):
        for c, piece in enumerate(pieces):
            place = pr.columns(program, piece, start)
            valid = place < program.queries if program.queries % program.block else None
            if stretch is not None:
                at = pr.columns(program, piece, jnp.int32(0))
                inside = (at >= stretch[0]) & (at < stretch[1])
                valid = inside if valid is None else valid & inside
            stop = None if stretch is None else stretch[1]
            shift = None if since is None else dk.undecayed(program, operands, h, piece, since)
            keys[i, c] = bb.load_keys(program, operands, (h, piece), scale, start, stop, shift)
            fades = program.decay and since is None
            fading[i, c] = dk.factors(program, operands, h, piece) if fades else None
            for g in range(program.groups):
                rows[i, g, c] = bb.load_rows(program, operands, given, (h, g, piece), scale, valid)
    before: dict[Any, Array] = {}
    for i, (_, _, kv, _) in enumerate(heads):
        for c in range(len(pieces)):
            before[i, c] = kv
            if c + 1 < len(pieces):
                factors = fading[i, c]
                value = dk.fading_values(program, keys[i, c].value, factors)
                kv = kv if factors is None else kv * factors.whole
                kv = kv + pr.product(program, value, keys[i, c].features, NN)
    cotangents = [d_kv for *_, d_kv in heads]
    pulled = [Pulled({}, [], [], [], [], d_kv, None, None) for *_, d_kv in heads]
    for c in reversed(range(len(pieces))):
        for i, (h, *_) in enumerate(heads):
            chunk = [rows[i, g, c] for g in range(program.groups)]
            factors = fading[i, c]
            pulled[i] = _pull_back_chunk(
                program,
                operands,
                (h, c),
                (chunk, keys[i, c], factors),
                before[i, c],
                cotangents[i],
                pulled[i],
                weights,
            )
            if factors is not None:
                cotangents[i] = cotangents[i] * factors.whole
            factor = None if factors is None else factors.before_columns()
            for row in chunk:
                cotangents[i] = cotangents[i] + bb.state_gradient(program, row, factor)
    return [p._replace(d_kv=d_kv) for p, d_kv in zip(pulled, cotangents, strict=True)]


def _pull_back_chunk(
    program: Program,
    operands: Operands,
    place: tuple[Any, int],
    chunk: tuple[list[bb.Rows], bb.Keys, dk.Factors | None],
    kv: Array,
    d_kv: Array,
    pulled: Pulled,
    weights: bool,
) -> Pulled:
    """Adds the gradients of a chunk; chunks come from last to first."""
    (h, c), (rows, keys, factors) = place, chunk
    v, lower = program.value_dim, pr.seen_pairs(program)
    value = pr.transpose(keys.value)
    pairs, d_value = [], pr.product(program, d_kv[:v], keys.features, NT)
    faded = turned_faded = read_factor = None
    if factors is not None:
        d_value = d_value * factors.left
        faded, turned_faded = factors.pairs(program), factors.turned(program)
        read_factor = factors.before_columns()
    d_weights = [pulled.query_weights, pulled.key_weights]
    sums = dk.Sums.empty(program) if program.decay and not weights else None

    def added(total: Array | None, x: Array) -> Array:
        return x if total is None else total + x

    for g, row in enumerate(rows):
        d_weight = pr.product(program, value, row.numerator, NN) + row.denominator
        d_pairs = _fade(jnp.where(lower, d_weight, 0), faded).astype(program.operand)
        turned = pr.product(program, pr.transpose(row.numerator), keys.value, NN)
        turned = turned + pr.transpose(row.denominator)
        turned = _fade(jnp.where(pr.seen_pairs(program, 1), turned, 0), turned_faded)
        read = _fade(bb.read_gradient(program, row, kv), read_factor)
        cotangent = bb.pull_back_rows(program, row, read, keys, turned)
        pairs.append((row, d_pairs))
        query_weights, _ = operands.of_queries(h)
        if weights:
            d_weights[0] = added(d_weights[0], bb.weight_gradient(program, row.query, cotangent))
        else:
            pulled.query[g, c] = bb.input_gradient(program, query_weights, cotangent)[0]
            seen = jnp.where(lower, pr.product(program, keys.features, row.features, NT), 0)
            seen = _fade(seen, faded)
            d_value = d_value + pr.product(program, row.numerator, seen, NT)
            if sums is not None:
                sums = sums.add(program, seen * d_weight, row.features * read)
    kept_factor = None if factors is None else factors.left_columns()
    kept = _fade(bb.kept_gradient(program, keys, d_kv), kept_factor)
    cotangent = bb.pull_back_keys(program, keys, kept, pairs)
    if weights:
        d_weights[1] = added(d_weights[1], bb.weight_gradient(program, keys.key, cotangent))
        return pulled._replace(query_weights=d_weights[0], key_weights=d_weights[1])
    key_weights, _ = operands.of_keys(h)
    d_key, d_log = bb.input_gradient(program, key_weights, cotangent, keys.key)
    if sums is not None:
        whole = jnp.sum(kv[:v] * d_kv[:v], axis=0, keepdims=True)
        whole = whole + kv[v : v + 1] * jnp.sum(d_kv[v:], axis=0, keepdims=True)
        whole = _fade(
            jnp.sum(whole, axis=1, keepdims=True), None if factors is None else factors.whole
        )
        pulled = pulled._replace(
            decay=[sums.rows_of(program, keys.features * kept, whole), *pulled.decay]
        )
    return pulled._replace(
        key=[d_key, *pulled.key],
        value=[d_value, *pulled.value],
        key_log=[d_log, *pulled.key_log],
    )


def _fade(x: Array, factor: Array | None) -> Array:
    return x if factor is None else x * factor
