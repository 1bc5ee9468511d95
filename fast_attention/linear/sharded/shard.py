"""Linear attention of a sequence sharded over devices, from inside ``jax.shard_map``.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.implementations import run
from fast_attention.linear.segments import attend_within_segments
from fast_attention.linear.sharded.mesh_states import (
    Stretch,
    state_of_all,
    states_before,
)
from fast_attention.linear.state import LinearAttentionState, emptied
from fast_attention.linear.types import Inputs, Plan
from fast_attention.mesh.layout import AxisName, move_along

REDUCTION = "chunked"
"""What reduces keys alone, without decay or with segments, and lets queries read a state alone."""


class Edges(NamedTuple):
    """Segments at the ends of this device's stretch, bool ``[B]``.

    Attributes:
      first: its first segment starts with it.
      last: its last segment ends with it.
    """

    first: Array
    last: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend_along_axis(
    plan: Plan, return_state: bool, inputs: Inputs, ends: tuple[Array, Array] | None
) -> tuple[Any, LinearAttentionState | None]:
    """Attends from this device's stretch of a sequence to all of it.

    Args:
      plan: with the name of the mesh axis along which the sequence is sharded.
      return_state: also return the state after the last key of the whole sequence.
      inputs: of this device; the state is the same on all.
      ends: with segments, their ids at the first and at the last position, ``[B]``.
    """
    initial, axis_name = inputs.state, plan.axis_name
    assert axis_name is not None
    inputs = vary_alike(inputs, lax.axis_index(axis_name))
    if ends is None:
        whole = _stretch(reduced_keys(plan, inputs), None, inputs)
        if plan.causal:
            before = states_before(whole, initial, axis_name)
            out, _ = run(plan, inputs._replace(state=before))
            return out, state_of_all(whole, initial, axis_name) if return_state else None
        state = state_of_all(whole, initial, axis_name)
        return state_read(plan, inputs, state), (state if return_state else None)

    ids = inputs.segment_ids
    assert ids is not None
    edges = _edges(*ends, axis_name)
    inner = ids[:, -1] != ids[:, 0]
    to_the_right = _stretch(_reduced_segment(plan, inputs, -1), inner | edges.first, inputs)
    state = state_of_all(to_the_right, initial, axis_name) if return_state else None
    before = states_before(to_the_right, initial, axis_name)
    within = inputs._replace(state=emptied(before, edges.first))
    if plan.causal:
        return run(plan, within)[0], state
    to_the_left = Stretch(_reduced_segment(plan, inputs, 0), inner | edges.last)
    after = states_before(to_the_left, emptied(initial), axis_name, reverse=True)
    out, _ = attend_within_segments(run, plan, within, after=emptied(after, edges.last))
    return out, state


def reduced_keys(plan: Plan, inputs: Inputs) -> LinearAttentionState:
    """Returns the state of all keys in ``inputs``, and of no other."""
    if inputs.log_decay is not None:
        # Decays need the order of the keys: attention, by kernels or not, returns the state too.
        # Kernels do not serve segments. What queries of zeros read is not used.
        if inputs.segment_ids is not None:
            plan = dataclasses.replace(plan, implementation=REDUCTION)
        queries = jnp.zeros_like(inputs.key)
        keys = inputs._replace(query=queries, segment_ids=None, state=emptied(inputs.state))
        return run(plan, vary_alike(keys))[1]
    reduce = dataclasses.replace(plan, causal=False, implementation=REDUCTION)
    keys = inputs._replace(query=inputs.query[:, :0], segment_ids=None, state=emptied(inputs.state))
    return run(reduce, keys)[1]


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
    read = dataclasses.replace(plan, implementation=REDUCTION)
    return run(read, vary_alike(nothing))[0]


def _reduced_segment(plan: Plan, inputs: Inputs, place: int) -> LinearAttentionState:
    """Returns the state of the segment at ``place``, the first (0) or the last one (-1)."""
    ids = inputs.segment_ids
    assert ids is not None
    own = (ids == ids[:, place][:, None])[..., None]
    mask = own if inputs.key_mask is None else inputs.key_mask & own
    decay = inputs.log_decay
    if decay is not None:
        decay = jnp.where(own, decay, 0)
    return reduced_keys(plan, inputs._replace(key_mask=mask, log_decay=decay))


def _stretch(state: LinearAttentionState, fresh: Array | None, inputs: Inputs) -> Stretch:
    decay = inputs.log_decay
    return Stretch(state, fresh, None if decay is None else jnp.sum(decay, axis=1))


def _edges(first: Array, last: Array, axis_name: AxisName) -> Edges:
    """Compares the ids at the ends of this stretch, ``[B]``, with those of its neighbours.

    The first stretch has what came before the sequence in front of it.
    """
    count, place = lax.axis_size(axis_name), lax.axis_index(axis_name)
    before = move_along(last, axis_name, [(i, i + 1) for i in range(count - 1)])
    after = move_along(first, axis_name, [(i + 1, i) for i in range(count - 1)])
    return Edges(
        first=(place > 0) & (before != first),
        last=(place < count - 1) & (after != last),
    )
