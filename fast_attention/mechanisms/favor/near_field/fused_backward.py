"""The gradients of :mod:`.fused`, from the last chunk of rows to the first.

The window of a chunk of C rows holds ``C + n`` keys. Its first C keys become far in this chunk, so
their gradients have two parts: from exact weights, and from features, in this chunk and in the
state that later chunks read. Its last C keys are in no window of an earlier chunk: their gradients
are complete, and stored. Those of its first n keys are passed on to the chunk before, whose last n
keys they are.

Shape letters: those of :mod:`.fused`, and R rows of all query heads that share a key head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal import pass_chunk
from fast_attention.linear.chunked.causal_chunk import read_causal
from fast_attention.linear.chunked.causal_chunk_backward import RowCotangents, pull_back_causal
from fast_attention.linear.chunked.chunk_decay import chunk_decay, decayed_sums, pull_back_decay
from fast_attention.linear.chunked.chunk_state import absorb_keys
from fast_attention.linear.chunked.gradient_buffers import (
    add_decay_gradient,
    add_key_gradient,
    add_query_gradient,
    as_cotangent,
    gradient_buffers,
    with_first_decay,
)
from fast_attention.linear.chunked.loops import scan_chunks, scan_chunks_back
from fast_attention.linear.chunked.output_buffers import parts_gradient
from fast_attention.linear.chunked.slices import (
    causal_sight,
    exponents_of,
    key_features,
    query_features,
    store,
    unload_rows,
)
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.types import Inputs, Plan
from fast_attention.mechanisms.favor.near_field.walk import Operands, Walk, all_weights, plan_walk
from fast_attention.mechanisms.favor.near_field.window import (
    Reach,
    load_window,
    pull_back_window,
    window_logits,
)


class _Carry(NamedTuple):
    """What goes from a chunk to the one before it.

    Attributes:
      kv: cotangent of the state's sums after the chunk's keys, ``[B, K, V, M]``.
      k_sum: ``[B, K, M]``.
      later: gradients so far of the last n keys of the chunk's window: key, value and bias or None,
        ``[B, n, K, ...]``.
      far_bias: buffer for the gradient of ``Operands.far_bias``, or None.
      grads: buffers for the others.
    """

    kv: Array
    k_sum: Array
    later: tuple[Array | None, ...]
    far_bias: Array | None
    grads: Inputs


_OutputsIn = Callable[[Inputs], tuple[Any, Any]]


def backward(plan: Plan, reach: Reach, residuals: Any, cotangents: Any) -> tuple[Operands]:
    """Returns the cotangents of the operands of :func:`.fused.attend`."""
    operands, out, saved_first, saved = residuals
    d_out, d_state = cotangents
    walk = plan_walk(plan, reach, operands)
    inputs = walk.inputs
    buffers, outputs_in = gradient_buffers(plan, inputs, out, d_out)
    chunk = functools.partial(_pull_back_chunk, walk, outputs_in)
    first_rows = functools.partial(_pull_back_first_rows, walk, outputs_in)
    rerun = functools.partial(pass_chunk, plan, walk.far, walk.einsum)

    def group_of_chunks(carry, start, length, saved):
        """Computes the states of a group's chunks again."""
        state, kept = saved
        _, pasts = scan_chunks(rerun, state, length, walk.size, walk.unroll, start)
        whole, rest = zip(kept, pasts, strict=True)
        both = whole, (None if kept[1] is None else rest)
        return scan_chunks_back(chunk, carry, both, length, walk.size, walk.unroll, start)

    first_keys = (
        None if x is None else jnp.zeros_like(x[:, : reach.distance], d_state.kv.dtype)
        for x in (inputs.key, inputs.value, inputs.key_bias)
    )
    d_far_bias = None if operands.far_bias is None else jnp.zeros_like(operands.far_bias)
    carry = _Carry(d_state.kv, d_state.k_sum, tuple(first_keys), d_far_bias, buffers)
    if walk.group:
        carry = scan_chunks_back(group_of_chunks, carry, saved, walk.length, walk.group, 1)
    else:
        carry = scan_chunks_back(chunk, carry, saved, walk.length, walk.size, walk.unroll)
    d_first, grads = scan_chunks_back(
        first_rows,
        (carry.later, carry.grads),
        saved_first,
        walk.offset,
        walk.first_size,
        walk.unroll,
    )
    grads = _store_keys(grads, d_first, jax.tree.map(jnp.zeros_like, grads.parameters), 0)
    d_before = LinearAttentionState(carry.kv, carry.k_sum, None)
    grads = with_first_decay(inputs, grads, d_before, reach.distance)
    return (Operands(as_cotangent(inputs, grads, d_before), None, carry.far_bias),)


def _pull_back_chunk(
    walk: Walk, outputs_in: _OutputsIn, carry: _Carry, start: Array | int, size: int, saved: Any
) -> _Carry:
    """Pulls the outputs of a chunk of rows that see far keys, and the state after it, back.

    Args:
      walk: the call.
      outputs_in: returns the outputs and their cotangents, see :func:`gradient_buffers`.
      carry: from the chunk after this one.
      start: the first row, among those that have far keys.
      size: number of rows.
      saved: what :func:`.fused.attend` kept of the chunk, and the state before it.
    """
    plan, inputs, far, einsum = walk.plan, walk.inputs, walk.far, walk.einsum
    distance = walk.reach.distance
    kept, past = saved
    d_kv, d_k_sum, d_later, d_far_keys, grads = carry
    row = start + walk.offset
    # The weights again, as the forward pass computed them.
    window = load_window(inputs, walk.reach, row, size, start, size + distance)
    queries, pull_queries = query_features(plan, inputs, row, size)
    keys, value, pull_keys = key_features(plan, far, start, size)
    sight = causal_sight(far, start, size)
    decay = chunk_decay(far, start, size)
    read = read_causal(
        past.first,
        queries,
        keys,
        sight,
        einsum,
        exponents_of(plan, far, row, start, size),
        kept,
        decay=decay,
    )
    assert read.log_scale is not None
    near = jnp.exp(window_logits(window, einsum) - read.log_scale[..., None])
    d_numerator, d_denominator = parts_gradient(
        plan, inputs, kept.denominator, read.log_scale, *outputs_in(grads), row, size
    )
    # One product gives the cotangents of near and far weights alike.
    d_weights = einsum("bkrv,bksv->bkrs", d_numerator, window.value) + d_denominator[..., None]
    d_near = pull_back_window(window, near, d_weights, einsum)
    absorbed = absorb_keys(past.first, keys, sight.enter, sight.keep, past.log_scale, decay)
    d_rows = RowCotangents(d_weights[..., :size], d_numerator, d_denominator)
    pulled = pull_back_causal(
        queries,
        keys,
        value,
        past,
        read,
        absorbed,
        d_rows,
        d_kv,
        d_k_sum,
        sight.enter,
        einsum,
    )
    d_value = einsum("bkrs,bkrv->bksv", all_weights(near, pulled.weights), d_numerator)
    d_query, d_parameters = pull_queries(pulled.queries)
    d_query = d_query + unload_rows(d_near.rows, size)
    grads = add_query_gradient(grads, (d_query, d_parameters), row)
    *d_far, d_parameters, d_far_bias = pull_keys(pulled.keys, pulled.value)
    d_far_bias = None if d_far_bias is None else jnp.swapaxes(d_far_bias, 1, 2)
    d_window = _by_position(d_near.key, d_value, d_near.bias)
    if decay is not None:
        assert d_near.log_decay is not None
        assert d_far_keys is not None and d_far_bias is not None
        found = decayed_sums(
            read,
            past.first,
            absorbed,
            value,
            d_rows,
            pulled.weights * d_rows.weights,
            (d_kv, d_k_sum),
            einsum,
        )
        shifted = start + distance + 1
        grads = add_decay_gradient(grads, pull_back_decay(found), shifted, adding=True)
        grads = add_decay_gradient(grads, d_near.log_decay, start, adding=True)
        # With decay, the bias of a key as a far one is an operand of its own.
        d_far_keys, d_far_bias = store(d_far_keys, d_far_bias, start), None
    d_window = _add_far_and_later(d_window, (*d_far, d_far_bias), d_later, size)
    done = jax.tree.map(lambda x: x[:, distance:], d_window)
    grads = _store_keys(grads, done, d_parameters, start + distance)
    d_later = jax.tree.map(lambda x: x[:, :distance], d_window)
    return _Carry(pulled.kv, pulled.k_sum, d_later, d_far_keys, grads)


def _add_far_and_later(
    d_window: tuple[Array | None, ...],
    d_far: tuple[Array | None, ...],
    d_later: tuple[Array | None, ...],
    size: int,
) -> tuple[Array | None, ...]:
    """Adds gradients of a window's first keys as far ones, and of its last keys by later chunks."""

    def whole(x: Array | None, far: Array | None, later: Array | None) -> Array | None:
        if x is None or later is None:
            return None
        first = x[:, :size] if far is None else x[:, :size] + far
        return jnp.concatenate([first, x[:, size:] + later], axis=1)

    return tuple(map(whole, d_window, d_far, d_later))


def _pull_back_first_rows(
    walk: Walk, outputs_in: _OutputsIn, carry: Any, start: Array | int, size: int, saved: Any
) -> Any:
    """Pulls the outputs of rows that see near keys alone back, as `_pull_back_chunk` does."""
    denominator, scale = saved
    d_first, grads = carry
    inputs, einsum = walk.inputs, walk.einsum
    window = load_window(inputs, walk.reach, start, size, 0, walk.reach.distance)
    weights = jnp.exp(window_logits(window, einsum) - scale[..., None])
    d_numerator, d_denominator = parts_gradient(
        walk.plan, inputs, denominator, scale, *outputs_in(grads), start, size
    )
    d_weights = einsum("bkrv,bksv->bkrs", d_numerator, window.value) + d_denominator[..., None]
    d_value = einsum("bkrs,bkrv->bksv", weights, d_numerator)
    d_near = pull_back_window(window, weights, d_weights, einsum)
    nothing = jax.tree.map(jnp.zeros_like, grads.parameters)
    grads = add_query_gradient(grads, (unload_rows(d_near.rows, size), nothing), start)
    if d_near.log_decay is not None:
        grads = add_decay_gradient(grads, d_near.log_decay, 0, adding=True)
    d_window = _by_position(d_near.key, d_value, d_near.bias)
    return jax.tree.map(jnp.add, d_first, d_window), grads


def _by_position(*arrays: Array | None) -> Any:
    """``[B, K, S, ...]`` to ``[B, S, K, ...]``."""
    return tuple(None if x is None else jnp.swapaxes(x, 1, 2) for x in arrays)


def _store_keys(grads: Inputs, d_keys: Any, d_parameters: Any, start: Array | int) -> Inputs:
    d_key, d_value, d_bias = d_keys
    d_bias = None if d_bias is None else jnp.swapaxes(d_bias, 1, 2)
    return add_key_gradient(grads, (d_key, d_value, d_parameters, d_bias), start)
