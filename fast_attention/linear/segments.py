"""Attention both ways within segments, from two causal passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.state import LinearAttentionState, emptied
from fast_attention.linear.types import Inputs, Parts, Plan, finish, merge_parts

Run = Callable[[Plan, Inputs], tuple[Array | Parts, LinearAttentionState]]


def attend_within_segments(
    run: Run, plan: Plan, inputs: Inputs, after: LinearAttentionState | None = None
) -> tuple[Array, LinearAttentionState]:
    """Attention within segments: one causal pass from each side, merged.

    The second pass runs over the reversed sequence with keys moved on by one, so that it covers
    exactly the keys after a position.

    Args:
      run: attends causally.
      plan: bidirectional.
      inputs: with segments.
      after: keys behind the last one that belong to its segment, None for none.
    """
    assert inputs.segment_ids is not None
    one_way = dataclasses.replace(plan, causal=True, output="parts")
    if plan.output == "sum":
        # Parts carry their scale; the map must still give complete features.
        one_way = dataclasses.replace(one_way, complete=True)
    left, state = run(one_way, inputs)
    ids = jnp.flip(inputs.segment_ids, 1)
    mask = jnp.ones((*ids.shape, 1), bool)
    if inputs.key_mask is not None:
        mask = jnp.flip(inputs.key_mask, 1)
    same = ids[:, 1:] == ids[:, :-1]
    mask = jnp.pad(mask[:, :-1] & same[:, :, None], ((0, 0), (1, 0), (0, 0)))

    def moved(x: Array | None) -> Array | None:
        if x is None:
            return None
        return jnp.pad(jnp.flip(x, 1)[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))

    key, value = moved(inputs.key), moved(inputs.value)
    assert key is not None and value is not None
    right, _ = run(
        one_way,
        inputs._replace(
            query=jnp.flip(inputs.query, 1),
            key=key,
            value=value,
            key_mask=mask,
            key_bias=moved(inputs.key_bias),
            segment_ids=ids,
            state=emptied(inputs.state) if after is None else after,
        ),
    )
    right = jax.tree.map(lambda x: jnp.flip(x, 1), right)
    assert isinstance(left, Parts) and isinstance(right, Parts)
    out = finish(merge_parts(left, right), plan.output, plan.epsilon)
    return out.astype(jnp.result_type(inputs.query, inputs.key, inputs.value)), state
