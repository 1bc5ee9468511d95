"""The causal backward kernel: from the last block to the first, with the state's cotangent.

A block's features are made again on the scale that the forward pass used, its states from the one
that was saved before it. Where the forward pass raised the scale inside a block, each stretch of
rows between two such keys is pulled back on its own scale, and what comes from later blocks on the
last one. So is a block that the forward pass computed again because of decay.

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
from fast_attention.linear.pallas_tpu import decay as dk
from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.backward_block import Given, Gradients
from fast_attention.linear.pallas_tpu.causal_pull_back import Pulled, pull_back_block
from fast_attention.linear.pallas_tpu.operands import (
    Operands,
    launch,
    operand_specs,
    saved_spec,
    state_scratch,
)
from fast_attention.linear.pallas_tpu.program import Program


class Saved(NamedTuple):
    """What the forward pass saved of each block; see :class:`.operands.Results`."""

    states: Any
    before: Any
    after: Any
    again: Any


class Scratch(NamedTuple):
    """Memory of a program: the state's cotangent, and sums of one head over stretches of rows."""

    d_kv: Any
    state: Any
    query: Any
    key: Any
    value: Any
    key_log: Any
    decay: Any = None


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
                None if saved.again is None else saved_spec(program, 1, back),
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
            *([memory(2, program.block)] if program.decay else []),
        ],
    )(operands, given, saved)


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
        heads = []
        for h in range(program.heads):
            d_kv, scale = scratch.d_kv[h], saved.before[h, 0]
            if saved.again is not None:
                d_kv = d_kv * jnp.exp2(scale - saved.after[h, 0])
            heads.append((h, scale, saved.states[h, 0], d_kv))
        pulled = pull_back_block(program, operands, given, heads, start, weights=weights)
        for h, head in enumerate(pulled):
            scratch.d_kv[h] = head.d_kv
            _write(program, results, h, head)

    if not program.exponential:
        on_one_scale()
    else:
        if saved.again is not None:
            raised = jnp.max(saved.again[:, 0]) > 0
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
        if results.decay is not None:
            results.decay[h, :, piece] = head.decay[c]


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
        if ref is not None:
            ref[...] = jnp.zeros_like(ref)

    def stretch(carry):
        scale, low, since = carry
        logs = []
        for piece in pieces:
            shift = None if since is None else dk.undecayed(program, operands, h, piece, since)
            key, _, constants = pr.load_keys(program, operands, h, piece, start, shift)
            key_weights, offset = operands.of_keys(h)
            logs.append(pr.key_pre_features(program, key, key_weights, scale - offset, constants))
        high = pr.first_over(program, [jnp.max(x, axis=1, keepdims=True) for x in logs], low)
        last = high == program.block
        moved, raised = first - scale, scale + jnp.maximum(pr.row_of(program, logs, high), 0)
        d_kv, now = scratch.d_kv[h], None
        if since is not None:
            now = dk.sum_until(program, operands, h, jnp.minimum(high, program.block - 1))
            moved = moved + dk.between(since, dk.block_start())
            raised = raised + dk.between(now, since)
            d_kv = d_kv * jnp.exp2(scale + dk.between(now, since) - saved.after[h, 0])
        decay = jnp.exp2(moved)
        d_kv = jnp.where(last, d_kv, 0)
        head = pull_back_block(
            program,
            operands,
            given,
            [(h, scale, saved.states[h, 0] * decay, d_kv)],
            start,
            weights=weights,
            stretch=(low, high),
            since=since,
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
                if scratch.decay is not None:
                    scratch.decay[:, piece] += head.decay[c]
        return jnp.where(last, scale, raised), high, now

    since = None if saved.again is None else dk.block_start()
    jax.lax.while_loop(
        lambda carry: carry[1] < program.block, stretch, (first, jnp.int32(0), since)
    )
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
            [] if scratch.decay is None else [scratch.decay[:, p] for p in pieces],
            scratch.state[...],
            None,
            None,
        )
        _write(program, results, h, head)
