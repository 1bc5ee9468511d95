"""The bidirectional forward kernel: blocks of keys into a state, then blocks of queries out of it.

The state's scale is that of the first key until a key exceeds it by 2^80 (:data:`.program.LIMIT`);
then it is raised to the maximum of the block.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.operands import (
    Operands,
    Results,
    float32,
    head_spec,
    launch,
    operand_specs,
    query_spec,
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
      save: also return denominators and the final state.
      final: also return the final state.
    """
    heads, rows, v = operands.key.shape[0], operands.query.shape[0], program.value_dim
    m = program.padded_features
    keys, queries = (pl.cdiv(x, program.block) for x in (program.keys, program.queries))
    of_keys = lambda j: jnp.minimum(j, keys - 1)  # noqa: E731
    of_queries = lambda j: jnp.maximum(j - keys, 0)  # noqa: E731
    shapes = Results(jax.ShapeDtypeStruct((rows, v, program.queries), operands.value.dtype))
    specs = Results(query_spec(program, v, of_queries))
    if save:
        shapes = shapes._replace(denominator=float32(rows, 1, program.queries))
        specs = specs._replace(denominator=query_spec(program, 1, of_queries))
    if save or final:
        shapes = shapes._replace(kv=float32(heads, v + pr.EXTRA, m), scale=float32(heads, 1, m))
        specs = specs._replace(kv=head_spec(program, v + pr.EXTRA), scale=head_spec(program, 1))
    return launch(
        program,
        functools.partial(_kernel, program, keys),
        "bidirectional_forward",
        keys + queries,
        in_specs=(operand_specs(program, operands, of_queries, of_keys),),
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=state_scratch(program),
    )(operands)


def _kernel(
    program: Program, keys: int, operands: Any, results: Results, kv_ref: Any, scale_ref: Any
) -> None:
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        start_state(operands, kv_ref, scale_ref)

    @pl.when(step < keys)
    def _():
        _absorb(program, operands, kv_ref, scale_ref, step * program.block)

    if results.kv is not None:

        @pl.when(step == keys - 1)
        def _():
            results.kv[...] = kv_ref[...]
            results.scale[...] = scale_ref[...]

    @pl.when(step >= keys)
    def _():
        _read(program, operands, results, kv_ref, scale_ref)


def _read(program: Program, operands: Any, results: Results, kv_ref: Any, scale_ref: Any) -> None:
    """Reads a block of queries out of the states of a program."""
    features = {}
    for h in range(program.heads):
        weights, offset = operands.of_queries(h)
        for g in range(program.groups):
            for c, piece in enumerate(program.chunks()):
                query = operands.query[h * program.groups + g, :, piece]
                x, _ = pr.query_features(program, query, weights, scale_ref[h] + offset)
                features[h, g, c] = x.astype(program.operand)
    for (h, g, c), x in features.items():
        write_rows(program, results, (h, g, c), pr.product(program, kv_ref[h], x, NT), None)


def _absorb(program: Program, operands: Any, kv_ref: Any, scale_ref: Any, start: Any) -> None:
    """Adds a block of keys to the states of a program."""

    def loaded(h):
        for piece in program.chunks():
            key, value, constants = pr.load_keys(program, operands, h, piece, start)
            weights, offset = operands.of_keys(h)
            logs = pr.key_pre_features(program, key, weights, scale_ref[h] - offset, constants)
            yield logs, pr.with_ones(program, value), constants

    features, largest = [], []
    for h in range(program.heads):
        for logs, value, constants in loaded(h):
            largest.append(jnp.max(logs, axis=0, keepdims=True))
            x = pr.key_features(program, logs, constants).astype(program.operand)
            features.append((h, value, x))
    sums = [kv_ref[h] for h in range(program.heads)]
    for h, value, x in features:
        sums[h] = sums[h] + pr.product(program, value, x, NN)

    def write():
        for h, total in enumerate(sums):
            kv_ref[h] = total

    if not program.exponential:
        write()
        return
    over = pr.any_over(program, jnp.concatenate(largest, axis=0))
    pl.when(jnp.logical_not(over))(write)

    @pl.when(over)
    def _():
        def one_head(h, _):
            chunks = list(loaded(h))
            rise = functools.reduce(
                jnp.maximum, [jnp.max(logs, axis=0, keepdims=True) for logs, *_ in chunks]
            )
            rise = jnp.maximum(rise, 0)
            total = kv_ref[h] * jnp.exp2(-rise)
            for logs, value, _ in chunks:
                total = total + pr.product(program, value, jnp.exp2(logs - rise), NN)
            kv_ref[h] = total
            scale_ref[h] = scale_ref[h] + rise
            return 0

        jax.lax.fori_loop(0, program.heads, one_head, 0)
