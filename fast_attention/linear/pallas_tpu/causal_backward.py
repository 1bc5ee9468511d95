"""The causal backward kernel: from the last block to the first, with the state's cotangent.

A block's features are made again on the scale that the forward pass used, its states from the one
that was saved before it. Where the forward pass raised the scale inside a block, each stretch of
rows between two such keys is pulled back on its own scale, and what comes from later blocks on the
last one.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu import backward_block as bb
from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.backward_block import Given, Gradients
from fast_attention.linear.pallas_tpu.operands import (
    Operands,
    launch,
    operand_specs,
    saved_spec,
    state_scratch,
)
from fast_attention.linear.pallas_tpu.program import NN, NT, Program


class Saved(NamedTuple):
    """What the forward pass saved of each block; see :class:`.operands.Results`."""

    states: Any
    before: Any
    after: Any


class Scratch(NamedTuple):
    """Memory of a program: the state's cotangent, and sums of one head over stretches of rows."""

    d_kv: Any
    state: Any
    query: Any
    key: Any
    value: Any
    key_log: Any


def backward(
    program: Program,
    operands: Operands,
    given: Given,
    saved: Saved,
    *,
    weights: bool,
) -> Gradients:
    """Runs the kernel.

    Args:
      program: choices.
      operands: of the forward pass.
      given: results and cotangents.
      saved: by the forward pass.
      weights: return the gradients of weights and offsets; else all others.
    """
    d, v, m = program.head_dim, program.value_dim, program.padded_features
    blocks = pl.cdiv(program.keys, program.block)
    back = lambda j: blocks - 1 - j  # noqa: E731
    shapes, specs = bb.gradient_specs(program, operands, back, back, weights=weights)
    memory = lambda *shape: pltpu.VMEM(shape, jnp.float32)  # noqa: E731
    return launch(
        program,
        functools.partial(_kernel, program),
        "causal_backward_of_weights" if weights else "causal_backward",
        blocks,
        in_specs=(
            operand_specs(program, operands, back, back),
            bb.given_specs(program, given, back),
            Saved(
                saved_spec(program, v + pr.EXTRA, back),
                saved_spec(program, 1, back),
                saved_spec(program, 1, back),
            ),
        ),
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[
            state_scratch(program)[0],
            memory(v + pr.EXTRA, m),
            memory(program.groups, d, program.block),
            memory(d, program.block),
            memory(v, program.block),
            memory(1, program.block),
        ],
    )(operands, given, saved)


class Pulled(NamedTuple):
    """Gradients of a block of one head, by query head and chunk, or of weights."""

    query: dict[tuple[int, int], Array]
    key: list[Array]
    value: list[Array]
    key_log: list[Array]
    d_kv: Array
    query_weights: Array | None
    key_weights: Array | None


def _kernel(
    program: Program,
    operands: Operands,
    given: Given,
    saved: Saved,
    results: Gradients,
    *memory: Any,
) -> None:
    scratch = Scratch(*memory)
    step, weights = pl.program_id(1), results.query_weights is not None
    start = (pl.num_programs(1) - 1 - step) * program.block

    @pl.when(step == 0)
    def _():
        bb.start(given, results, scratch.d_kv)

    def on_one_scale():
        heads = [
            (h, saved.before[h, 0], saved.states[h, 0], scratch.d_kv[h])
            for h in range(program.heads)
        ]
        pulled = pull_back_block(program, operands, given, heads, start, weights=weights)
        for h, head in enumerate(pulled):
            scratch.d_kv[h] = head.d_kv
            _write(program, results, h, head)

    if not program.exponential:
        on_one_scale()
    else:
        raised = jnp.max(saved.after[:, 0] - saved.before[:, 0]) > 0
        pl.when(jnp.logical_not(raised))(on_one_scale)

        @pl.when(raised)
        def _():
            def one_head(h, _):
                _on_several_scales(program, operands, given, saved, results, scratch, h, start)
                return 0

            jax.lax.fori_loop(0, program.heads, one_head, 0)

    if results.kv is not None:

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            results.kv[...] = scratch.d_kv[...]


def _write(program: Program, results: Gradients, h: Any, head: Pulled) -> None:
    if results.query_weights is not None:
        assert head.query_weights is not None and head.key_weights is not None
        results.query_weights[h] += head.query_weights
        results.key_weights[h] += head.key_weights
        return
    for c, piece in enumerate(program.chunks()):
        for g in range(program.groups):
            results.query[h * program.groups + g, :, piece] = head.query[g, c].astype(
                results.query.dtype
            )
        results.key[h, :, piece] = head.key[c].astype(results.key.dtype)
        results.value[h, :, piece] = head.value[c].astype(results.value.dtype)
        if results.key_log is not None:
            results.key_log[h, :, piece] = head.key_log[c]


def pull_back_block(
    program: Program,
    operands: Operands,
    given: Given,
    heads: list[tuple[Any, Array, Array, Array]],
    start: Array,
    *,
    weights: bool,
    stretch: tuple[Array, Array] | None = None,
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
    """
    pieces = program.chunks()
    rows: dict[Any, bb.Rows] = {}
    keys: dict[Any, bb.Keys] = {}
    for i, (h, scale, *_) in enumerate(heads):
        for c, piece in enumerate(pieces):
            place = pr.columns(program, piece, start)
            valid = place < program.queries if program.queries % program.block else None
            if stretch is not None:
                at = pr.columns(program, piece, jnp.int32(0))
                inside = (at >= stretch[0]) & (at < stretch[1])
                valid = inside if valid is None else valid & inside
            stop = None if stretch is None else stretch[1]
            keys[i, c] = bb.load_keys(program, operands, (h, piece), scale, start, stop)
            for g in range(program.groups):
                rows[i, g, c] = bb.load_rows(program, operands, given, (h, g, piece), scale, valid)
    before: dict[Any, Array] = {}
    for i, (_, _, kv, _) in enumerate(heads):
        for c in range(len(pieces)):
            before[i, c] = kv
            if c + 1 < len(pieces):
                value = pr.with_ones(program, keys[i, c].value)
                kv = kv + pr.product(program, value, keys[i, c].features, NN)
    cotangents = [d_kv for *_, d_kv in heads]
    pulled = [Pulled({}, [], [], [], d_kv, None, None) for *_, d_kv in heads]
    for c in reversed(range(len(pieces))):
        for i, (h, *_) in enumerate(heads):
            chunk = [rows[i, g, c] for g in range(program.groups)]
            pulled[i] = _pull_back_chunk(
                program,
                operands,
                (h, c),
                chunk,
                keys[i, c],
                before[i, c],
                cotangents[i],
                pulled[i],
                weights,
            )
            for row in chunk:
                cotangents[i] = cotangents[i] + bb.state_gradient(program, row)
    return [p._replace(d_kv=d_kv) for p, d_kv in zip(pulled, cotangents, strict=True)]


def _pull_back_chunk(
    program: Program,
    operands: Operands,
    place: tuple[Any, int],
    rows: list[bb.Rows],
    keys: bb.Keys,
    kv: Array,
    d_kv: Array,
    pulled: Pulled,
    weights: bool,
) -> Pulled:
    """Adds the gradients of a chunk; chunks come from last to first."""
    h, c = place
    v, lower = program.value_dim, pr.seen_pairs(program)
    value = pr.transpose(keys.value)
    pairs, d_value = [], pr.product(program, d_kv[:v], keys.features, NT)
    d_weights = [pulled.query_weights, pulled.key_weights]

    def added(total: Array | None, x: Array) -> Array:
        return x if total is None else total + x

    for g, row in enumerate(rows):
        d_pairs = pr.product(program, value, row.numerator, NN) + row.denominator
        d_pairs = jnp.where(lower, d_pairs, 0).astype(program.operand)
        turned = pr.product(program, pr.transpose(row.numerator), keys.value, NN)
        turned = turned + pr.transpose(row.denominator)
        turned = jnp.where(pr.seen_pairs(program, 1), turned, 0)
        cotangent = bb.pull_back_rows(program, row, kv, keys, turned)
        pairs.append((row, d_pairs))
        query_weights, _ = operands.of_queries(h)
        if weights:
            d_weights[0] = added(d_weights[0], bb.weight_gradient(program, row.query, cotangent))
        else:
            pulled.query[g, c] = bb.input_gradient(program, query_weights, cotangent)[0]
            seen = jnp.where(lower, pr.product(program, keys.features, row.features, NT), 0)
            d_value = d_value + pr.product(program, row.numerator, seen, NT)
    cotangent = bb.pull_back_keys(program, keys, d_kv, pairs)
    if weights:
        d_weights[1] = added(d_weights[1], bb.weight_gradient(program, keys.key, cotangent))
        return pulled._replace(query_weights=d_weights[0], key_weights=d_weights[1])
    key_weights, _ = operands.of_keys(h)
    d_key, d_log = bb.input_gradient(program, key_weights, cotangent, keys.key)
    return pulled._replace(
        key=[d_key, *pulled.key],
        value=[d_value, *pulled.value],
        key_log=[d_log, *pulled.key_log],
    )


def _on_several_scales(
    program: Program,
    operands: Operands,
    given: Given,
    saved: Saved,
    results: Gradients,
    scratch: Scratch,
    h: Array,
    start: Array,
) -> None:
    """Pulls the stretches of a head's rows back, each on the scale it was computed on."""
    first, pieces = saved.before[h, 0], program.chunks()
    weights = results.query_weights is not None
    for ref in scratch[1:]:
        ref[...] = jnp.zeros_like(ref)

    def stretch(carry):
        scale, low = carry
        logs = []
        for piece in pieces:
            key, _, constants = pr.load_keys(program, operands, h, piece, start)
            key_weights, offset = operands.of_keys(h)
            logs.append(pr.key_pre_features(program, key, key_weights, scale - offset, constants))
        high = pr.first_over(program, [jnp.max(x, axis=1, keepdims=True) for x in logs], low)
        decay = jnp.exp2(first - scale)
        last = high == program.block
        d_kv = jnp.where(last, scratch.d_kv[h], 0)
        head = pull_back_block(
            program,
            operands,
            given,
            [(h, scale, saved.states[h, 0] * decay, d_kv)],
            start,
            weights=weights,
            stretch=(low, high),
        )[0]
        scratch.state[...] += head.d_kv * decay
        if weights:
            _write(program, results, h, head)
        else:
            for c, piece in enumerate(pieces):
                for g in range(program.groups):
                    scratch.query[g, :, piece] += head.query[g, c]
                scratch.key[:, piece] += head.key[c]
                scratch.value[:, piece] += head.value[c]
                scratch.key_log[:, piece] += head.key_log[c]
        raised = scale + jnp.maximum(pr.row_of(program, logs, high), 0)
        return jnp.where(last, scale, raised), high

    jax.lax.while_loop(lambda carry: carry[1] < program.block, stretch, (first, jnp.int32(0)))
    scratch.d_kv[h] = scratch.state[...]
    if not weights:
        head = Pulled(
            {
                (g, c): scratch.query[g, :, p]
                for g in range(program.groups)
                for c, p in enumerate(pieces)
            },
            [scratch.key[:, p] for p in pieces],
            [scratch.value[:, p] for p in pieces],
            [scratch.key_log[:, p] for p in pieces],
            scratch.state[...],
            None,
            None,
        )
        _write(program, results, h, head)
