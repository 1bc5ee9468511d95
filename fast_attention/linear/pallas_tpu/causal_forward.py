"""The causal forward kernel.

A program walks over the blocks of a few heads with their states in VMEM. Keys are read, and enter
the state, on one scale for each feature: that of the state, which some key seen before attains. So
no maximum over a chunk is taken, nothing inside it is rescaled, and one product of features is a
weight in the units of what is read from the state.

The scale serves as long as no key exceeds it by 2^80 (:data:`.program.LIMIT`). Where one does, rows
before it are right as they are; from it on the block is computed again on the maximum of the scale
and that key, up to the next such key. So a scale depends on keys that every row on it sees, and the
future cannot change the past by a bit.

With decay (:mod:`.decay`), rows and states that are too small for their scale are computed again as
well, from the first such row on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu import decay as dk
from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.operands import (
    Operands,
    Results,
    float32,
    head_spec,
    launch,
    operand_specs,
    query_spec,
    saved_spec,
    start_state,
    state_scratch,
    write_rows,
)
from fast_attention.linear.pallas_tpu.program import NN, NT, Program


def forward(program: Program, operands: Operands, *, save: bool, final: bool) -> Results:
    """Runs the kernel.

    Args:
      program: choices.
      operands: arrays.
      save: also return denominators, and the states before each block.
      final: also return the final state.
    """
    heads, rows, v = operands.key.shape[0], operands.query.shape[0], program.value_dim
    m, blocks = program.padded_features, pl.cdiv(program.keys, program.block)
    here = lambda j: j  # noqa: E731
    shapes = Results(jax.ShapeDtypeStruct((rows, v, program.queries), operands.value.dtype))
    specs = Results(query_spec(program, v, here))
    if save:
        shapes = shapes._replace(
            denominator=float32(rows, 1, program.queries),
            states=float32(heads, blocks, v + pr.EXTRA, m),
            before=float32(heads, blocks, 1, m),
            after=float32(heads, blocks, 1, m),
        )
        specs = specs._replace(
            denominator=query_spec(program, 1, here),
            states=saved_spec(program, v + pr.EXTRA, here),
            before=saved_spec(program, 1, here),
            after=saved_spec(program, 1, here),
        )
        if program.decay and program.exponential:
            shapes = shapes._replace(again=float32(heads, blocks, 1, m))
            specs = specs._replace(again=saved_spec(program, 1, here))
    if final:
        shapes = shapes._replace(kv=float32(heads, v + pr.EXTRA, m), scale=float32(heads, 1, m))
        specs = specs._replace(kv=head_spec(program, v + pr.EXTRA), scale=head_spec(program, 1))
    return launch(
        program,
        functools.partial(_kernel, program),
        "causal_forward",
        blocks,
        in_specs=(operand_specs(program, operands, here, here),),
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=state_scratch(program),
    )(operands)


class Attended(NamedTuple):
    """A block of one head: numerators and denominators by query head and chunk, and keys."""

    rows: dict[tuple[int, int], Array]
    kv: Array
    key_logs: list[Array]


def _kernel(program: Program, operands: Any, results: Results, kv_ref: Any, scale_ref: Any) -> None:
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        start_state(operands, kv_ref, scale_ref)

    if results.states is not None:
        results.states[:, 0] = kv_ref[...]
        results.before[:, 0] = scale_ref[...]
    attended = attend_block(
        program,
        operands,
        [(h, scale_ref[h], kv_ref[h]) for h in range(program.heads)],
        block * program.block,
    )
    for h, head in enumerate(attended):
        for (g, c), row in head.rows.items():
            write_rows(program, results, (h, g, c), row, None)
    if not program.exponential:
        for h, head in enumerate(attended):
            kv_ref[h] = head.kv
    else:
        largest = [jnp.max(x, axis=1, keepdims=True) for a in attended for x in a.key_logs]
        over = pr.any_over(program, jnp.concatenate(largest, axis=0))
        if program.decay:
            small = [dk.too_small(program, operands, h, a) for h, a in enumerate(attended)]
            over = over | (jnp.max(jnp.concatenate(small, axis=0)) > 0)
        if results.again is not None:
            results.again[...] = jnp.full(results.again.shape, jnp.where(over, 1.0, 0.0))

        @pl.when(jnp.logical_not(over))
        def _():
            for h, head in enumerate(attended):
                if program.decay:
                    kv_ref[h], scale_ref[h] = dk.on_own_scale(program, head.kv, scale_ref[h])
                else:
                    kv_ref[h] = head.kv

        @pl.when(over)
        def _():
            wrong = [_first_wrong(program, operands, h, a) for h, a in enumerate(attended)]

            def one_head(h, _):
                _rescale(program, operands, results, (kv_ref, scale_ref), h, block, wrong)
                return 0

            jax.lax.fori_loop(0, program.heads, one_head, 0)

    if results.after is not None:
        results.after[:, 0] = scale_ref[...]
    if results.kv is not None:

        @pl.when(block == pl.num_programs(1) - 1)
        def _():
            results.kv[...] = kv_ref[...]
            results.scale[...] = scale_ref[...]


def _first_wrong(program: Program, operands: Any, h: int, head: Attended) -> Array | None:
    """Returns the first row that must be computed again, or None for one that a key tells."""
    if not program.decay:
        return None
    largest = [jnp.max(x, axis=1, keepdims=True) for x in head.key_logs]
    over = pr.first_over(program, largest, jnp.int32(0))
    return jnp.minimum(over, dk.first_too_small(program, operands, h, head))


def attend_block(
    program: Program,
    operands: Any,
    heads: list[tuple[Any, Array, Array]],
    start: Array,
    since: dk.Since | None = None,
) -> list[Attended]:
    """Attends in a block, each head on one scale.

    Features of all chunks are made before the first is read, and all heads take each step one
    after the other: what does not depend on each other overlaps.

    Args:
      program: choices.
      operands: refs of a block.
      heads: number, scale ``[1, M]`` and state on it ``[V + 16, M]`` of each head.
      start: position of the block in the sequence.
      since: the token whose decay counts last; then units are undecayed. None for decaying ones.
    """
    lower, pieces = pr.seen_pairs(program), program.chunks()
    queries, keys, logs, values, left = {}, {}, {}, {}, {}
    fading: dict[Any, dk.Factors | None] = {}
    for i, (h, scale, _) in enumerate(heads):
        for c, piece in enumerate(pieces):
            shift = None if since is None else dk.undecayed(program, operands, h, piece, since)
            key, value, constants = pr.load_keys(program, operands, h, piece, start, shift)
            weights, offset = operands.of_keys(h)
            logs[i, c] = pr.key_pre_features(program, key, weights, scale - offset, constants)
            keys[i, c] = pr.key_features(program, logs[i, c], constants).astype(program.operand)
            fades = program.decay and since is None
            fading[i, c] = dk.factors(program, operands, h, piece) if fades else None
            values[i, c] = pr.with_ones(program, value)
            left[i, c] = values[i, c]
            if fading[i, c] is not None:
                left[i, c] = dk.fading_values(program, value, fading[i, c])
            weights, offset = operands.of_queries(h)
            for g in range(program.groups):
                query = operands.query[h * program.groups + g, :, piece]
                x, _ = pr.query_features(program, query, weights, scale + offset)
                queries[i, g, c] = x.astype(program.operand)
    states = [kv for *_, kv in heads]
    rows: list[dict[tuple[int, int], Array]] = [{} for _ in heads]
    for c in range(len(pieces)):
        for i in range(len(heads)):
            factors = fading[i, c]
            faded = None if factors is None else factors.pairs(program)
            for g in range(program.groups):
                query = queries[i, g, c]
                pairs, read = (pr.product(program, x, query, NT) for x in (keys[i, c], states[i]))
                pairs = jnp.where(lower, pairs, 0)
                if factors is not None and faded is not None:
                    pairs, read = pairs * faded, read * factors.before
                rows[i][g, c] = read + pr.product(program, values[i, c], pairs, NN)
            if factors is not None:
                states[i] = states[i] * factors.whole
            states[i] = states[i] + pr.product(program, left[i, c], keys[i, c], NN)
    return [
        Attended(rows[i], states[i], [logs[i, c] for c in range(len(pieces))])
        for i in range(len(heads))
    ]


def _rescale(
    program: Program,
    operands: Any,
    results: Results,
    memory: tuple[Any, Any],
    h: Array,
    block: Array,
    wrong: list[Array | None],
) -> None:
    """Computes a head's rows from the first key on that exceeds the scale, and the state.

    With decay it computes the rows from ``wrong[h]`` on, and all denominators, in undecayed units.
    """
    kv_ref, scale_ref = memory
    start, first = block * program.block, scale_ref[h]
    from_row = wrong[0]
    for i, row in enumerate(wrong[1:], start=1):
        if row is not None and from_row is not None:
            from_row = jnp.where(h == i, row, from_row)

    def stretch(carry):
        scale, low, known, since = carry
        gone = first - scale
        if program.decay:
            gone = gone + dk.between(since, dk.block_start())
        attended = attend_block(
            program, operands, [(h, scale, kv_ref[h] * jnp.exp2(gone))], start, since
        )[0]
        logs = attended.key_logs
        largest = [jnp.max(x, axis=1, keepdims=True) for x in logs]
        high = pr.first_over(program, largest, low)

        def write():
            for (g, c), row in attended.rows.items():
                at = pr.columns(program, program.chunks()[c], jnp.int32(0))
                inside = (at >= low) & (at < high)
                chosen = inside if from_row is None else inside & (at >= from_row)
                write_rows(program, results, (h, g, c), row, (chosen, inside))

        if program.decay:
            write()
        else:
            # Rows of the first stretch are right as they are.
            pl.when(jnp.logical_not(known))(write)

        raised = scale + jnp.maximum(pr.row_of(program, logs, high), 0)
        if program.decay:
            last = jnp.minimum(high, program.block - 1)
            now = dk.sum_until(program, operands, h, last)
            scale, raised = (x + dk.between(now, since) for x in (scale, raised))
            since = now

        @pl.when(high == program.block)
        def _():
            if program.decay:
                kv_ref[h], scale_ref[h] = dk.on_own_scale(program, attended.kv, scale)
            else:
                kv_ref[h] = attended.kv
                scale_ref[h] = scale

        return jnp.where(high < program.block, raised, scale), high, jnp.bool_(False), since

    since = dk.block_start() if program.decay else None
    start_of_block = (first, jnp.int32(0), jnp.bool_(True), since)
    jax.lax.while_loop(lambda carry: carry[1] < program.block, stretch, start_of_block)
