"""The near and the far field in one pass over the sequence, causal.

A chunk of rows reads three things: the state of the keys that are far from all of its rows; the C
keys after those, which become far one after the other, through features; and the exact weights of
the keys between. The latter two lie in one window of ``C + n`` keys, with n the distance from which
on keys are far, and no row reads a key in both ways: one matrix of weights, on one scale, goes into
one product with the values.

This is causal linear attention between rows from the n-th on and keys up to the n-th last, as in
:mod:`fast_attention.linear.chunked.causal`, with more weights to each row. The first n
rows have no far keys and are done apart.

Shape letters: B batch, T rows, S keys, H heads, K key/value heads, V value width, C chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal_chunk import Past, add_first_key, read_causal, row_sums
from fast_attention.linear.chunked.chunk_decay import chunk_decay
from fast_attention.linear.chunked.chunk_state import absorb_keys, next_state
from fast_attention.linear.chunked.loops import scan_chunks
from fast_attention.linear.chunked.output_buffers import empty_output, write_output
from fast_attention.linear.chunked.slices import (
    causal_sight,
    exponents_of,
    key_features,
    query_features,
)
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.types import Parts, Plan
from fast_attention.mechanisms.favor.near_field import fused_backward
from fast_attention.mechanisms.favor.near_field.walk import Operands, Walk, all_weights, plan_walk
from fast_attention.mechanisms.favor.near_field.window import (
    Reach,
    largest_logit,
    load_window,
    window_logits,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    plan: Plan, reach: Reach, operands: Operands
) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes attention and the state of far keys after the last row.

    Args:
      plan: causal, with complete features.
      reach: which keys are near, at most S positions away.
      operands: the arrays.

    Returns:
      ``[B, T, H, V]``, or :class:`Parts` if asked for, and the state.
    """
    return _forward(plan, reach, operands, save=False)[0]


def attend_plainly(
    plan: Plan, reach: Reach, operands: Operands
) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes the same as :func:`attend`, to be differentiated by JAX, in either mode."""
    return _forward(plan, reach, operands, save=False)[0]


def _forward(plan: Plan, reach: Reach, operands: Operands, *, save: bool = True):
    walk = plan_walk(plan, reach, operands)
    first_rows = functools.partial(_read_first_rows, walk, save)
    chunk = functools.partial(_read_chunk, walk, save)

    def group_of_chunks(carry, start, length):
        state, _ = carry
        carry, kept = scan_chunks(chunk, carry, length, walk.size, walk.unroll, start)
        return carry, (state, kept)

    out, saved_first = scan_chunks(
        first_rows, empty_output(plan, walk.inputs), walk.offset, walk.first_size, walk.unroll
    )
    carry = (walk.inputs.state, out)
    if walk.group and save:
        (state, out), saved = scan_chunks(group_of_chunks, carry, walk.length, walk.group, 1)
    else:
        (state, out), saved = scan_chunks(chunk, carry, walk.length, walk.size, walk.unroll)
    return (out, state), (operands, out, saved_first, saved)


attend.defvjp(_forward, fused_backward.backward)


def _read_first_rows(walk: Walk, save: bool, out: Any, start: Array | int, size: int) -> Any:
    """Writes the outputs of rows that see near keys alone."""
    window = load_window(walk.inputs, walk.reach, start, size, 0, walk.reach.distance)
    logits = window_logits(window, walk.einsum)
    scale = largest_logit(logits)
    weights = jnp.exp(logits - scale[..., None])
    numerator = walk.einsum("bkrs,bksv->bkrv", weights, window.value)
    parts = Parts(numerator, row_sums(weights), scale)
    kept = (parts.denominator, scale) if save else None
    return write_output(walk.plan, out, parts, start), kept


def _read_chunk(walk: Walk, save: bool, carry: Any, start: Array | int, size: int) -> Any:
    """Writes the outputs of rows that see far keys, and adds what becomes far to the state.

    Args:
      walk: the call.
      save: whether to return what the backward pass needs.
      carry: the state of far keys before the chunk, and the outputs.
      start: the first row, among those that have far keys.
      size: number of rows.
    """
    plan, inputs, far, einsum = walk.plan, walk.inputs, walk.far, walk.einsum
    state, out = carry
    row = start + walk.offset
    window = load_window(inputs, walk.reach, row, size, start, size + walk.reach.distance)
    logits = window_logits(window, einsum)
    queries, _ = query_features(plan, inputs, row, size)
    keys, value, _ = key_features(plan, far, start, size)
    sight = causal_sight(far, start, size)
    decay = chunk_decay(far, start, size)
    first, old = add_first_key(state, keys, value, sight, decay)
    read = read_causal(
        first,
        queries,
        keys,
        sight,
        einsum,
        exponents_of(plan, far, row, start, size),
        at_least=largest_logit(logits),
        decay=decay,
    )
    assert read.log_scale is not None
    near = jnp.exp(logits - read.log_scale[..., None])
    weights = all_weights(near, read.weights)
    numerator = read.past + einsum("bkrs,bksv->bkrv", weights, window.value)
    kept = read.kept._replace(denominator=read.kept.denominator + row_sums(near))
    out = write_output(plan, out, Parts(numerator, kept.denominator, read.log_scale), row)
    absorbed = absorb_keys(first, keys, sight.enter, sight.keep, fading=decay)
    after = next_state(first, absorbed, value, einsum)
    if not save:
        return (after, out), None
    past = Past(first, old, absorbed.log_scale)
    return (after, out), (kept if walk.group else (kept, past))
