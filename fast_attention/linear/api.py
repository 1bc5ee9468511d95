"""``linear_attention``: attention of queries, keys and values, according to a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from fast_attention.arrays.bundles import bundle_of
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.forward_mode import naming_forward_mode
from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps.base import Parameters
from fast_attention.linear.checks import spread_segments
from fast_attention.linear.explain import note_call
from fast_attention.linear.implementations import check_decays, run
from fast_attention.linear.prepare import fill_empty, prepare
from fast_attention.linear.sharded.shard import attend_along_axis
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import is_symbolic, pad_symbolic
from fast_attention.linear.types import Inputs, Plan


@overload
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    plan: Plan | None = ...,
    *,
    parameters: Parameters,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    log_decay: Array | None = ...,
    return_state: Literal[False] = ...,
    **options: Any,
) -> Array: ...


@overload
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    plan: Plan | None = ...,
    *,
    parameters: Parameters,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    log_decay: Array | None = ...,
    return_state: Literal[True],
    **options: Any,
) -> tuple[Array, LinearAttentionState]: ...


@runs_on_auto_axes
def linear_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    plan: Plan | None = None,
    *,
    parameters: Parameters,
    key_mask: Bool[Array, "*#B S"] | Bool[Array, "*#B S #K"] | None = None,
    key_bias: Float[Array, "*#B S"] | Float[Array, "*#B S #K"] | None = None,
    segment_ids: Int[Array, "*#B T"] | None = None,
    initial_state: LinearAttentionState | None = None,
    log_decay: Float[Array, "*B T K"] | Float[Array, "*#B K"] | None = None,
    return_state: bool = False,
    **options: Any,
) -> Any:
    r"""Attention with weights ``phi(q_t) . phi(k_s)``, in linear time and memory.

    .. math::
        y_t = \frac{\sum_s \phi(q_t) \cdot \phi(k_s) \, v_s}{\sum_s \phi(q_t) \cdot \phi(k_s)}

    with the sums over ``s <= t`` if causal. Exponential maps are evaluated with running maxima over
    earlier positions only: nothing overflows, and causal outputs up to t are bit-identical whatever
    the tokens after t are.

    With ``plan.axis_name`` the call is made inside ``jax.shard_map``, with the positions, masks,
    biases and ids of one device; the sequence is sharded along that axis in order. Devices exchange
    states only, ``K V M`` numbers per sequence: causal attention in ``1 + ceil(log2 n)`` rounds on
    n devices, bidirectional attention in one sum, and the same in the backward pass. Bidirectional
    attention then always uses the chunked XLA implementation.

    Shape letters: B batch (any number of axes, none included), T queries, S keys, H heads, K
    key/value heads (a divisor of H: query head h reads key head ``h // (H / K)``), D head width,
    V value width.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``; S = T if causal.
      value: ``[*B, S, K, V]``.
      plan: the feature map, causality, and how to compute the call; None takes them from `options`.
      parameters: of the feature map, as from ``feature_map.init``; their leading axes, if any,
        broadcast against ``[K]`` or ``[prod(B), K]``.
      key_mask: ``[*B, S]`` or ``[*B, S, K]``; a key where it is False contributes nothing to
        outputs or to the state, whatever its values are.
      key_bias: ``[*B, S]`` or ``[*B, S, K]``; multiplies the weights of a key by ``exp(bias)``.
        Biases of -1e4 and less mask the key.
      segment_ids: ``[*B, T]``, self-attention only: positions see their own run of equal ids.
        A new run starts from an empty state.
      initial_state: state of earlier keys, the same on all devices; with segments it belongs to the
        first run.
      log_decay: ``[*B, T, K]``, or ``[K]`` for all tokens, at most 0, causal attention only: the
        state (numerator and sum of weights) is multiplied by ``exp(log_decay)`` before a token is
        added. So the weight of key s for query t has the factor ``exp(log_decay_{s+1} + ... +
        log_decay_t)``. A masked token does not decay. -1e4 or less resets the state.
      return_state: also return the state after the last key (of the last run). With
        ``initial_state``, a sequence can be split into two calls; both are differentiable.
      **options: fields of :class:`~fast_attention.Plan`, such as ``feature_map=..., causal=True``.

    Returns:
      ``[*B, T, H, V]`` in the promoted dtype of query, key and value; a row that sees no key is 0,
      and batches and sequences may be empty. If the plan asks for parts, they are
      :class:`~fast_attention.linear.types.Parts`. With ``return_state`` a pair of that and the
      :class:`LinearAttentionState`, the same on all devices.

    Raises:
      ValueError: for shapes or options that do not fit together.
      NotImplementedError: if the requested implementation does not support the call.
      TypeError: in forward mode (``jax.jvp``, ``jax.linearize``) of an implementation with a custom
        gradient; ``implementation="reference"`` supports forward mode. ``jax.hessian`` works with
        every implementation on XLA.

    References:
      arXiv:2009.14794 (FAVOR+); arXiv:2006.16236 (linear attention and its state).
    """
    plan = bundle_of(Plan, "plan", plan, options)
    # A state has true units, so that any other call can continue it.
    complete = plan.complete or return_state or initial_state is not None
    plan, inputs = prepare(
        dataclasses.replace(plan, complete=complete),
        query,
        key,
        value,
        parameters=parameters,
        key_mask=key_mask,
        key_bias=key_bias,
        segment_ids=segment_ids,
        initial_state=initial_state,
        log_decay=log_decay,
    )
    if log_decay is not None:
        check_decays(plan)
    note_call(plan, inputs)
    batch_shape = query.shape[:-3]
    batch, length = inputs.query.shape[:2]
    if plan.axis_name is not None:
        inputs = fill_empty(inputs)
        ends = None
        if segment_ids is not None:
            ids = spread_segments(segment_ids, query)
            ids = jnp.pad(ids, [(0, int(n == 0)) for n in ids.shape])
            ends = ids[:, 0], ids[:, -1]
        with _naming_forward_mode():
            attended = attend_along_axis(plan, return_state, inputs, ends)
    else:
        inputs = fill_empty(pad_symbolic(plan, inputs))
        with _naming_forward_mode():
            attended = _attend(plan, vary_alike(inputs))
    if is_symbolic(length) or length == 0:
        attended = (jax.tree.map(lambda x: x[:, :length], attended[0]), attended[1])
    if batch == 0:
        attended = jax.tree.map(lambda x: x[:0], attended)
    out, state = jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), attended)
    if initial_state is not None:
        state = jax.tree.map(lambda x: x.astype(initial_state.kv.dtype), state)
    return (out, state) if return_state else out


def _naming_forward_mode() -> contextlib.AbstractContextManager[None]:
    return naming_forward_mode("Linear attention", "implementation='reference' has it")


# Compiled as one: called outside jit, the loops inside would be compiled anew in every call.
@functools.partial(jax.jit, static_argnums=0)
def _attend(plan: Plan, inputs: Inputs) -> tuple[Any, LinearAttentionState]:
    return run(plan, inputs)
