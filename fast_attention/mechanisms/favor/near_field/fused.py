"""The near and the far field in one pass over the sequence, causal, forward and backward.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal import group_length, pass_chunk
from fast_attention.linear.chunked.causal_chunk import (
    Past,
    add_first_key,
    read_causal,
    row_sums,
)
from fast_attention.linear.chunked.causal_chunk_backward import RowCotangents, pull_back_causal
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.chunked.chunk_decay import (
    chunk_decay,
    decayed_sums,
    pull_back_decay,
)
from fast_attention.linear.chunked.chunk_state import absorb_keys, next_state
from fast_attention.linear.chunked.gradient_buffers import (
    add_decay_gradient,
    add_key_gradient,
    add_query_gradient,
    as_cotangent,
    gradient_buffers,
    with_first_decay,
)
from fast_attention.linear.chunked.loops import scan_chunks, scan_chunks_back
from fast_attention.linear.chunked.output_buffers import (
    empty_output,
    parts_gradient,
    write_output,
)
from fast_attention.linear.chunked.slices import (
    causal_sight,
    exponents_of,
    key_features,
    query_features,
    store,
    unload_rows,
)
from fast_attention.linear.rounded_products import einsum_of
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.types import Inputs, Parts, Plan
from fast_attention.mechanisms.favor.near_field.window import (
    Reach,
    largest_logit,
    load_window,
    pull_back_window,
    window_logits,
)


class Operands(NamedTuple):
    """The arrays of one call.

    Attributes:
      inputs: of linear attention, over all positions. If there are n keys more than queries, these
        are in front of them.
      far_mask: bool ``[B, S - n, K or 1]`` or None: which keys are ever read as far ones.
      far_bias: ``[B, S - n, K]``, the bias of keys as far ones: their own, and their decay until
        they become far. None without decay, where it is their own.
    """

    inputs: Inputs
    far_mask: Array | None
    far_bias: Array | None = None

    def far(self, distance: int) -> Inputs:
        """The inputs whose t-th key goes with the t-th row that has far keys.

        What has become far decays with the rows.
        """
        inputs = self.inputs
        ids, log_decay = (
            None if x is None else x[:, distance:] for x in (inputs.segment_ids, inputs.log_decay)
        )
        bias = inputs.key_bias if self.far_bias is None else self.far_bias
        return inputs._replace(
            key_mask=self.far_mask, key_bias=bias, segment_ids=ids, log_decay=log_decay
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
    inputs = operands.inputs
    distance = reach.distance
    far, offset, length = operands.far(distance), *_extent(reach, inputs)
    chunk_size, unroll, group = _sizes(plan, inputs, length)
    size, first_size = min(chunk_size, length), min(chunk_size, offset)
    einsum = einsum_of(plan, inputs)

    def first_rows(out, start, size):
        window = load_window(inputs, reach, start, size, 0, distance)
        logits = window_logits(window, einsum)
        scale = largest_logit(logits)
        weights = jnp.exp(logits - scale[..., None])
        numerator = einsum("bkrs,bksv->bkrv", weights, window.value)
        parts = Parts(numerator, row_sums(weights), scale)
        kept = (parts.denominator, scale) if save else None
        return write_output(plan, out, parts, start), kept

    def chunk(carry, start, size):
        state, out = carry
        row = start + offset
        window = load_window(inputs, reach, row, size, start, size + distance)
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
        weights = _all_weights(near, read.weights)
        numerator = read.past + einsum("bkrs,bksv->bkrv", weights, window.value)
        kept = read.kept._replace(denominator=read.kept.denominator + row_sums(near))
        out = write_output(plan, out, Parts(numerator, kept.denominator, read.log_scale), row)
        absorbed = absorb_keys(first, keys, sight.enter, sight.keep, fading=decay)
        after = next_state(first, absorbed, value, einsum)
        if not save:
            return (after, out), None
        past = Past(first, old, absorbed.log_scale)
        return (after, out), (kept if group else (kept, past))

    def group_of_chunks(carry, start, length):
        state, _ = carry
        carry, kept = scan_chunks(chunk, carry, length, size, unroll, start)
        return carry, (state, kept)

    out, saved_first = scan_chunks(
        first_rows, empty_output(plan, inputs), offset, first_size, unroll
    )
    carry = (inputs.state, out)
    if group and save:
        (state, out), saved = scan_chunks(group_of_chunks, carry, length, group, 1)
    else:
        (state, out), saved = scan_chunks(chunk, carry, length, size, unroll)
    return (out, state), (operands, out, saved_first, saved)


def _backward(plan: Plan, reach: Reach, residuals: Any, cotangents: Any) -> tuple[Operands]:
    operands, out, saved_first, saved = residuals
    d_out, d_state = cotangents
    inputs = operands.inputs
    distance = reach.distance
    far, offset, length = operands.far(distance), *_extent(reach, inputs)
    chunk_size, unroll, group = _sizes(plan, inputs, length)
    size, first_size = min(chunk_size, length), min(chunk_size, offset)
    einsum = einsum_of(plan, inputs)
    buffers, outputs_in = gradient_buffers(plan, inputs, out, d_out)

    rerun = functools.partial(pass_chunk, plan, far, einsum)

    def chunk(carry, start, size, saved):
        kept, past = saved
        d_kv, d_k_sum, d_later, d_far_keys, grads = carry
        row = start + offset
        window = load_window(inputs, reach, row, size, start, size + distance)
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
        d_value = einsum("bkrs,bkrv->bksv", _all_weights(near, pulled.weights), d_numerator)
        d_query, d_parameters = pull_queries(pulled.queries)
        d_query = d_query + unload_rows(d_near.rows, size)
        grads = add_query_gradient(grads, (d_query, d_parameters), row)
        *d_far, d_parameters, d_far_bias = pull_keys(pulled.keys, pulled.value)
        d_far_bias = None if d_far_bias is None else jnp.swapaxes(d_far_bias, 1, 2)
        d_window = _by_position(d_near.key, d_value, d_near.bias)
        if decay is not None:
            assert d_near.log_decay is not None and d_far_bias is not None
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
            d_far_keys, d_far_bias = store(d_far_keys, d_far_bias, start), None
        d_far = (*d_far, d_far_bias)

        # Later chunks have no more to add to the last of these keys, and none to the others.
        def whole(x: Array | None, far: Array | None, later: Array | None) -> Array | None:
            if x is None or later is None:
                return None
            first = x[:, :size] if far is None else x[:, :size] + far
            return jnp.concatenate([first, x[:, size:] + later], axis=1)

        d_window = tuple(map(whole, d_window, d_far, d_later))
        done = jax.tree.map(lambda x: x[:, distance:], d_window)
        grads = _store_keys(grads, done, d_parameters, start + distance)
        d_later = jax.tree.map(lambda x: x[:, :distance], d_window)
        return pulled.kv, pulled.k_sum, d_later, d_far_keys, grads

    def group_of_chunks(carry, start, length, saved):
        state, kept = saved
        _, pasts = scan_chunks(rerun, state, length, size, unroll, start)
        whole, rest = zip(kept, pasts, strict=True)
        both = whole, (None if kept[1] is None else rest)
        return scan_chunks_back(chunk, carry, both, length, size, unroll, start)

    def first_rows(carry, start, size, saved):
        denominator, scale = saved
        d_first, grads = carry
        window = load_window(inputs, reach, start, size, 0, distance)
        weights = jnp.exp(window_logits(window, einsum) - scale[..., None])
        d_numerator, d_denominator = parts_gradient(
            plan, inputs, denominator, scale, *outputs_in(grads), start, size
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

    first_keys = (
        None if x is None else jnp.zeros_like(x[:, :distance], d_state.kv.dtype)
        for x in (inputs.key, inputs.value, inputs.key_bias)
    )
    d_far_keys = None if operands.far_bias is None else jnp.zeros_like(operands.far_bias)
    carry = (d_state.kv, d_state.k_sum, tuple(first_keys), d_far_keys, buffers)
    if group:
        carry = scan_chunks_back(group_of_chunks, carry, saved, length, group, 1)
    else:
        carry = scan_chunks_back(chunk, carry, saved, length, size, unroll)
    d_kv, d_k_sum, d_first, d_far_keys, grads = carry
    d_first, grads = scan_chunks_back(
        first_rows, (d_first, grads), saved_first, offset, first_size, unroll
    )
    grads = _store_keys(grads, d_first, jax.tree.map(jnp.zeros_like, grads.parameters), 0)
    d_before = LinearAttentionState(d_kv, d_k_sum, None)
    grads = with_first_decay(inputs, grads, d_before, distance)
    return (Operands(as_cotangent(inputs, grads, d_before), None, d_far_keys),)


attend.defvjp(_forward, _backward)


def _all_weights(near: Array, far: Array) -> Array:
    """Weights on all keys of a window: its first keys may be near or far, the others are near."""
    extra = near.shape[-1] - far.shape[-1]
    return near + jnp.pad(far, [(0, 0)] * (far.ndim - 1) + [(0, extra)])


def _by_position(*arrays: Array | None) -> Any:
    """``[B, K, S, ...]`` to ``[B, S, K, ...]``."""
    return tuple(None if x is None else jnp.swapaxes(x, 1, 2) for x in arrays)


def _store_keys(grads: Inputs, d_keys: Any, d_parameters: Any, start: Array | int) -> Inputs:
    d_key, d_value, d_bias = d_keys
    d_bias = None if d_bias is None else jnp.swapaxes(d_bias, 1, 2)
    return add_key_gradient(grads, (d_key, d_value, d_parameters, d_bias), start)


def _extent(reach: Reach, inputs: Inputs) -> tuple[int, int]:
    """Returns how many rows have no far keys, and how many do."""
    rows, keys = inputs.query.shape[1], inputs.key.shape[1]
    return reach.distance - (keys - rows), keys - reach.distance


def _sizes(plan: Plan, inputs: Inputs, length: int) -> tuple[int, int, int]:
    """Returns chunk size, unroll, and positions in a group (0: all states are kept)."""
    size, unroll = planned_chunk(plan, inputs)
    return size, unroll, group_length(plan, length, min(size, length))
