"""The bidirectional backward kernel: blocks of queries into the state's cotangent, then keys.

Both read the final state and its scale, which no key exceeds by more than 2^80.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu import backward_block as bb
from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.backward_block import Given, Gradients
from fast_attention.linear.pallas_tpu.operands import (
    Operands,
    head_spec,
    launch,
    operand_specs,
    state_scratch,
)
from fast_attention.linear.pallas_tpu.program import NT, Program


def backward(
    program: Program,
    operands: Operands,
    given: Given,
    kv: Array,
    scale: Array,
    *,
    weights: bool,
) -> Gradients:
    """Runs the kernel.

    Args:
      program: choices.
      operands: of the forward pass.
      given: results and cotangents.
      kv: the final state, ``[B K, V + 16, M]``.
      scale: its scale, ``[B K, 1, M]``.
      weights: return the gradients of weights and offsets; else all others.
    """
    keys, queries = (pl.cdiv(x, program.block) for x in (program.keys, program.queries))
    of_queries = lambda j: jnp.minimum(j, queries - 1)  # noqa: E731
    of_keys = lambda j: jnp.maximum(j - queries, 0)  # noqa: E731
    shapes, specs = bb.gradient_specs(program, operands, of_queries, of_keys, weights=weights)
    return launch(
        program,
        functools.partial(_kernel, program, queries),
        "bidirectional_backward_of_weights" if weights else "bidirectional_backward",
        keys + queries,
        in_specs=(
            operand_specs(program, operands, of_queries, of_keys),
            bb.given_specs(program, given, of_queries),
            head_spec(program, program.value_dim + pr.EXTRA),
            head_spec(program, 1),
        ),
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=state_scratch(program)[:1],
    )(operands, given, kv, scale)


def _kernel(
    program: Program,
    queries: int,
    operands: Any,
    given: Given,
    kv: Any,
    scale: Any,
    results: Gradients,
    d_kv_ref: Any,
) -> None:
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        bb.start(given, results, d_kv_ref)

    @pl.when(step < queries)
    def _():
        _pull_back_queries(program, operands, given, (kv, scale), results, d_kv_ref, step)

    @pl.when(step >= queries)
    def _():
        start = (step - queries) * program.block
        for piece in program.chunks():
            for h in range(program.heads):
                _pull_back_keys(program, operands, (h, piece, start), scale, results, d_kv_ref)

    if results.kv is not None:

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            results.kv[...] = d_kv_ref[...] * jnp.exp2(operands.scale[...] - scale[...])


def _pull_back_queries(
    program: Program,
    operands: Any,
    given: Given,
    state: Any,
    results: Gradients,
    d_kv_ref: Any,
    step: Array,
) -> None:
    kv, scale = state
    for piece in program.chunks():
        at = pr.columns(program, piece, step * program.block)
        valid = at < program.queries if program.queries % program.block else None
        for h in range(program.heads):
            weights, _ = operands.of_queries(h)
            total = d_kv_ref[h]
            for g in range(program.groups):
                rows = bb.load_rows(program, operands, given, (h, g, piece), scale[h], valid)
                read = bb.read_gradient(program, rows, kv[h])
                cotangent = bb.pull_back_rows(program, rows, read, None, None)
                total = total + bb.state_gradient(program, rows)
                if results.query_weights is not None:
                    results.query_weights[h] += bb.weight_gradient(program, rows.query, cotangent)
                else:
                    d_query, _ = bb.input_gradient(program, weights, cotangent)
                    head = h * program.groups + g
                    results.query[head, :, piece] = d_query.astype(results.query.dtype)
            d_kv_ref[h] = total


def _pull_back_keys(
    program: Program, operands: Any, place: Any, scale: Any, results: Gradients, d_kv_ref: Any
) -> None:
    h, piece, start = place
    keys = bb.load_keys(program, operands, (h, piece), scale[h], start)
    kept = bb.kept_gradient(program, keys, d_kv_ref[h])
    cotangent = bb.pull_back_keys(program, keys, kept, [])
    if results.key_weights is not None:
        results.key_weights[h] += bb.weight_gradient(program, keys.key, cotangent)
        return
    d_value = pr.product(program, d_kv_ref[h][: program.value_dim], keys.features, NT)
    weights, _ = operands.of_keys(h)
    d_key, d_log = bb.input_gradient(program, weights, cotangent, keys.key)
    results.key[h, :, piece] = d_key.astype(results.key.dtype)
    results.value[h, :, piece] = d_value.astype(results.value.dtype)
    if results.key_log is not None:
        results.key_log[h, :, piece] = d_log
