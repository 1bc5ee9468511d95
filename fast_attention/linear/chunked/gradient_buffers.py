"""Gradients of the inputs of linear attention, written chunk by chunk into buffers as long as they.

Shape letters: B batch, T length, C chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.slices import store
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.types import Inputs, Plan


def gradient_buffers(
    plan: Plan, inputs: Inputs, out: Any, d_out: Any
) -> tuple[Inputs, Callable[[Inputs], tuple[Any, Any]]]:
    """Returns buffers for gradients, and a function from them to the output and its cotangent.

    Where shapes and types agree, gradients are written over what is not read again: that of a chunk
    of queries over the cotangent of their outputs, that of keys over the outputs. Fresh memory is
    the most expensive part of the backward pass.
    """
    reused_d_out, reused_out = (
        plan.output != "parts" and old.shape == new.shape and old.dtype == new.dtype
        for old, new in ((d_out, inputs.query), (out, inputs.key))
    )
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    # Every entry is overwritten. Different fillings keep XLA from making one array of zeros and
    # copying it three times.
    buffers = inputs._replace(
        query=d_out if reused_d_out else jnp.full_like(inputs.query, 1),
        key=out if reused_out else jnp.full_like(inputs.key, 2),
        value=jnp.full_like(inputs.value, 3),
        parameters=zeros(inputs.parameters),
        key_bias=zeros(inputs.key_bias),
    )
    if inputs.log_decay is not None:
        # What a chunk leaves decays at the first token after it, behind the last one too.
        batch, length, heads = inputs.log_decay.shape
        gradient = jnp.zeros((batch, length + 1, heads), inputs.log_decay.dtype)
        buffers = buffers._replace(log_decay=vary_alike(gradient, inputs.log_decay))

    def outputs_in(grads: Inputs) -> tuple[Any, Any]:
        return grads.key if reused_out else out, grads.query if reused_d_out else d_out

    return buffers, outputs_in


def add_query_gradient(grads: Inputs, gradient: Any, start: Array | int) -> Inputs:
    """Stores what :func:`.slices.query_features` pulled back for the chunk at ``start``."""
    d_query, d_parameters = gradient
    return grads._replace(
        query=store(grads.query, d_query, start),
        parameters=jax.tree.map(jnp.add, grads.parameters, d_parameters),
    )


def add_key_gradient(grads: Inputs, gradient: Any, start: Array | int) -> Inputs:
    """Stores what :func:`.slices.key_features` pulled back for the chunk at ``start``."""
    d_key, d_value, d_parameters, d_bias = gradient
    if d_bias is not None:
        assert grads.key_bias is not None
        d_bias = store(grads.key_bias, jnp.swapaxes(d_bias, 1, 2), start)
    return grads._replace(
        key=store(grads.key, d_key, start),
        value=store(grads.value, d_value, start),
        parameters=jax.tree.map(jnp.add, grads.parameters, d_parameters),
        key_bias=d_bias,
    )


def add_decay_gradient(
    grads: Inputs, d_decay: Array, start: Array | int, *, adding: bool = False
) -> Inputs:
    """Stores what :func:`.chunk_decay.pull_back_decay` gave for the chunk at ``start - 1``.

    Args:
      grads: the buffers.
      d_decay: ``[B, K, N]``.
      start: the first token whose decay this is the gradient of.
      adding: whether to add it to what is there.
    """
    assert grads.log_decay is not None
    piece = jnp.swapaxes(d_decay, 1, 2)
    if adding:
        size = piece.shape[1]
        piece += jax.lax.dynamic_slice_in_dim(grads.log_decay, start, size, axis=1)
    return grads._replace(log_decay=store(grads.log_decay, piece, start))


def with_first_decay(
    inputs: Inputs, grads: Inputs, d_state: LinearAttentionState, place: int = 0
) -> Inputs:
    """Completes the gradient of decays by that of the token at `place`, which decays the state."""
    if grads.log_decay is None:
        return grads
    state = inputs.state
    first = (state.kv * d_state.kv).sum(axis=(-1, -2)) + (state.k_sum * d_state.k_sum).sum(axis=-1)
    grads = add_decay_gradient(grads, first[..., None], place, adding=place > 0)
    assert grads.log_decay is not None
    return grads._replace(log_decay=grads.log_decay[:, :-1])


def as_cotangent(inputs: Inputs, grads: Inputs, d_state: LinearAttentionState) -> Inputs:
    """Completes the gradients to what ``custom_vjp`` asks for."""
    scale = inputs.state.log_scale
    return grads._replace(
        key_mask=None,
        segment_ids=None,
        state=LinearAttentionState(
            d_state.kv, d_state.k_sum, None if scale is None else jnp.zeros_like(scale)
        ),
    )
