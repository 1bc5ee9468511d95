"""Linear attention of a sequence that lies across devices, from inside ``jax.shard_map``.

Each device reduces its own keys to a state, the states are put together across the mesh, and each
device attends locally with what came before as its initial state. Reducing the keys first costs one
more pass over keys and values; attending first and adding what queries read from the state behind
it would cost the same pass over queries, of which there are at least as many, and numerators and
denominators of all rows in memory.

Shape letters: B batch, T queries and S keys of this device, H heads, K key/value heads, D head
width, V value width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
from jax import lax

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear.api import implementation_names, run_implementation
from fast_attention.linear.checks import spread_segments
from fast_attention.linear.prepare import prepare
from fast_attention.linear.segments import attend_within_segments
from fast_attention.linear.sharded.mesh_states import (
    Stretch,
    state_of_all,
    states_before,
)
from fast_attention.linear.state import LinearAttentionState, emptied
from fast_attention.linear.types import Inputs, Plan, SavedStates
from fast_attention.mesh.layout import AxisName

REDUCTIONS = ("chunked",)
"""What reduces keys alone, and lets queries read a state alone."""


class Edges(NamedTuple):
    """Segments at the ends of this device's stretch, bool ``[B]``.

    Attributes:
      first: its first segment starts with it.
      last: its last segment ends with it.
    """

    first: Array
    last: Array


@overload
def linear_attention_of_shard(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: AxisName,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[False] = ...,
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int | None = ...,
    saved_states: SavedStates | None = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> Array: ...


@overload
def linear_attention_of_shard(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: AxisName,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[True],
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int | None = ...,
    saved_states: SavedStates | None = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> tuple[Array, LinearAttentionState]: ...


def linear_attention_of_shard(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    *,
    axis_name: AxisName,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = False,
    key_mask: Bool[Array, "*#B S"] | Bool[Array, "*#B S #K"] | None = None,
    key_bias: Float[Array, "*#B S"] | Float[Array, "*#B S #K"] | None = None,
    segment_ids: Int[Array, "*#B T"] | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    normalize: bool = True,
    epsilon: float = 0.0,
    chunk_size: int | None = None,
    unroll: int | None = None,
    saved_states: SavedStates | None = None,
    implementation: str | Sequence[str] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, LinearAttentionState]:
    r"""Attends from this device's stretch of a sequence to all of it, inside ``jax.shard_map``.

    The stretches lie along ``axis_name`` in the order of the devices. Devices exchange states
    alone, ``K V M`` numbers a sequence: causally in ``1 + ceil(log2 n)`` rounds on n devices,
    bidirectionally in one sum; the backward pass does the same the other way. For whole arrays see
    :func:`~fast_attention.linear.sharded_linear_attention`.

    Args:
      query: ``[*B, T, H, D]``, the positions of this device.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      axis_name: the mesh axis, or a tuple of axes, along which the sequence lies.
      feature_map: as in :func:`~fast_attention.linear.linear_attention`, and so are all
        others: masks, biases and ids are those of this device's positions.
      parameters: of the feature map, the same on all devices.
      causal: positions see those before them, on devices before this one too.
      key_mask: ``[*B, S]`` or ``[*B, S, K]``; a device where all is False contributes nothing.
      key_bias: ``[*B, S]`` or ``[*B, S, K]``.
      segment_ids: ``[*B, T]``; a run of equal ids goes on across devices.
      initial_state: keys before the first one of the whole sequence, the same on all devices.
      return_state: also return the state after the last key of the whole sequence.
      normalize: divide by the sum of weights.
      epsilon: guard of denominators.
      chunk_size: positions handled at once.
      unroll: chunks unrolled in the compiled loop.
      saved_states: what the backward pass of causal attention keeps.
      implementation: of the causal passes; keys are reduced, and a state is read by
        bidirectional attention, in chunks on XLA.
      precision: of products of features and values.

    Returns:
      ``[*B, T, H, V]``, the outputs of this device's positions. With ``return_state`` also the
      :class:`LinearAttentionState`, the same on all devices.

    Raises:
      ValueError: for shapes or options that do not fit together.
    """
    plan = Plan(
        feature_map=feature_map,
        causal=causal,
        output="mean" if normalize else "sum",
        epsilon=epsilon,
        chunk_size=chunk_size,
        unroll=unroll,
        saved_states=saved_states,
        precision=precision,
        complete=return_state or initial_state is not None,
    )
    plan, inputs = prepare(
        plan,
        query,
        key,
        value,
        parameters=parameters,
        key_mask=key_mask,
        key_bias=key_bias,
        segment_ids=segment_ids,
        initial_state=initial_state,
    )
    batch_shape, ends = query.shape[:-3], None
    if segment_ids is not None:
        ids = spread_segments(segment_ids, query)
        ends = ids[:, 0], ids[:, -1]
    attended = _attend(
        plan, axis_name, implementation_names(implementation), return_state, inputs, ends
    )
    out, state = jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), attended)
    return (out, state) if return_state else out


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attend(
    plan: Plan,
    axis_name: AxisName,
    names: tuple[str, ...],
    return_state: bool,
    inputs: Inputs,
    ends: tuple[Array, Array] | None,
) -> tuple[Any, LinearAttentionState | None]:
    initial = inputs.state
    inputs = vary_alike(inputs, lax.axis_index(axis_name))
    if ends is None:
        whole = Stretch(reduced_keys(plan, inputs), None)
        if plan.causal:
            before = states_before(whole, initial, axis_name)
            out, _ = run_implementation(plan, inputs._replace(state=before), names)
            state = state_of_all(whole, initial, axis_name) if return_state else None
            return out, state
        state = state_of_all(whole, initial, axis_name)
        return state_read(plan, inputs, state), (state if return_state else None)

    ids = inputs.segment_ids
    assert ids is not None
    edges = _edges(*ends, axis_name)
    inner = ids[:, -1] != ids[:, 0]
    to_the_right = Stretch(_reduced_segment(plan, inputs, -1), inner | edges.first)
    state = state_of_all(to_the_right, initial, axis_name) if return_state else None
    before = states_before(to_the_right, initial, axis_name)
    within = inputs._replace(state=emptied(before, edges.first))
    if plan.causal:
        out, _ = run_implementation(plan, within, names)
        return out, state
    to_the_left = Stretch(_reduced_segment(plan, inputs, 0), inner | edges.last)
    after = states_before(to_the_left, emptied(initial), axis_name, reverse=True)
    out, _ = attend_within_segments(
        lambda plan, inputs: run_implementation(plan, inputs, names),
        plan,
        within,
        after=emptied(after, edges.last),
    )
    return out, state


def reduced_keys(plan: Plan, inputs: Inputs) -> LinearAttentionState:
    """Returns the state of all keys in ``inputs``, and of no other."""
    reduce = dataclasses.replace(plan, causal=False)
    keys = inputs._replace(query=inputs.query[:, :0], segment_ids=None, state=emptied(inputs.state))
    return run_implementation(reduce, keys, REDUCTIONS)[1]


def state_read(plan: Plan, inputs: Inputs, state: LinearAttentionState) -> Array:
    """Returns what the queries read from a state alone, ``[B, T, H, V]``."""
    nothing = Inputs(
        query=inputs.query,
        key=inputs.key[:, :0],
        value=inputs.value[:, :0],
        parameters=inputs.parameters,
        key_mask=None,
        key_bias=None,
        segment_ids=None,
        state=state,
    )
    return run_implementation(plan, vary_alike(nothing), REDUCTIONS)[0]


def _reduced_segment(plan: Plan, inputs: Inputs, place: int) -> LinearAttentionState:
    """Returns the state of the segment at ``place``, the first (0) or the last one (-1)."""
    ids = inputs.segment_ids
    assert ids is not None
    own = (ids == ids[:, place][:, None])[..., None]
    mask = own if inputs.key_mask is None else inputs.key_mask & own
    return reduced_keys(plan, inputs._replace(key_mask=mask))


def _edges(first: Array, last: Array, axis_name: AxisName) -> Edges:
    """Compares the ids at the ends of this stretch, ``[B]``, with those of its neighbours.

    The first stretch has what came before the sequence in front of it.
    """
    count, place = lax.axis_size(axis_name), lax.axis_index(axis_name)
    before = lax.ppermute(last, axis_name, [(i, i + 1) for i in range(count - 1)])
    after = lax.ppermute(first, axis_name, [(i + 1, i) for i in range(count - 1)])
    return Edges(
        first=(place > 0) & (before != first),
        last=(place < count - 1) & (after != last),
    )
