"""The arrays of one pass over a near and a far field, and how it is cut into chunks.

Shape letters: B batch, S keys, K key/value heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal import group_length
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.rounded_products import Einsum, einsum_of
from fast_attention.linear.types import Inputs, Plan
from fast_attention.mechanisms.favor.near_field.window import Reach


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


class Walk(NamedTuple):
    """A call cut into chunks of rows: first those without far keys, then the others.

    Attributes:
      plan: static choices.
      reach: which keys are near.
      inputs: the arrays, over all positions.
      far: those whose t-th key goes with the t-th row that has far keys.
      offset: number of rows without far keys.
      length: number of rows with far keys.
      first_size: rows in a chunk of the former.
      size: rows in a chunk of the latter.
      unroll: chunks in one iteration of a loop.
      group: rows of which one state is saved for the backward pass; 0 saves that of each chunk.
      einsum: computes the products.
    """

    plan: Plan
    reach: Reach
    inputs: Inputs
    far: Inputs
    offset: int
    length: int
    first_size: int
    size: int
    unroll: int
    group: int
    einsum: Einsum


def plan_walk(plan: Plan, reach: Reach, operands: Operands) -> Walk:
    """Cuts a call into chunks."""
    inputs = operands.inputs
    rows, keys = inputs.query.shape[1], inputs.key.shape[1]
    offset, length = reach.distance - (keys - rows), keys - reach.distance
    chunk_size, unroll = planned_chunk(plan, inputs)
    size = min(chunk_size, length)
    return Walk(
        plan,
        reach,
        inputs,
        operands.far(reach.distance),
        offset,
        length,
        min(chunk_size, offset),
        size,
        unroll,
        group_length(plan, length, size),
        einsum_of(plan, inputs),
    )


def all_weights(near: Array, far: Array) -> Array:
    """Weights on all keys of a window: its first keys may be near or far, the others are near."""
    extra = near.shape[-1] - far.shape[-1]
    return near + jnp.pad(far, [(0, 0)] * (far.ndim - 1) + [(0, extra)])
