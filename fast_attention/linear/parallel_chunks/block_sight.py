"""Who sees whom in a block of chunks.

Shape letters: B batch, T length, H heads, K key/value heads, G = H / K, N chunks of a block,
C chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.causal_chunk import Sight
from fast_attention.linear.types import Inputs


class BlockSight(NamedTuple):
    """Who sees whom in a block.

    Attributes:
      chunks: inside each chunk; its axes ``[B, K]`` are ``[B * K, N]`` here.
      enter: which keys outlive their chunk, ``[B * K, N, C]``; None for all.
      seen: which point of :mod:`.block_states` sees which source, ``[B * K or 1, N + 1, N + 1]``.
    """

    chunks: Sight
    enter: Array | None
    seen: Array


def block_sight(inputs: Inputs, start: Array | int, size: int, chunks: int) -> BlockSight:
    """Returns who sees whom in a block, within segments if there are any."""
    kv_heads = inputs.key.shape[2]
    groups = inputs.query.shape[2] // kv_heads
    position = jnp.arange(size // chunks)
    # The first key of a chunk is read through the state.
    pairs = (position[None, :] <= position[:, None]) & (position[None, :] > 0)
    pairs = jnp.tile(pairs, (groups, 1))[None, None]
    later = (position > 0)[None, None]
    point = jnp.arange(chunks + 1)
    seen = (point[None, :] <= point[:, None])[None]
    occupied = inputs.key_mask is None
    if inputs.segment_ids is None:
        return BlockSight(Sight(pairs, later, occupied=occupied), None, seen)
    ids = jax.lax.dynamic_slice_in_dim(inputs.segment_ids, start, size, axis=1)
    before = jax.lax.dynamic_slice_in_dim(inputs.segment_ids, jnp.maximum(start - 1, 0), 1, axis=1)
    ids, before = (jnp.repeat(x, kv_heads, axis=0) for x in (ids, before))
    ids = ids.reshape(-1, chunks, size // chunks)
    first, last = ids[..., 0], ids[..., -1]
    # The segment in which each source ends; at a point it is that of the source just before.
    ends = jnp.concatenate([before, last], axis=1)
    rows = jnp.tile(ids, (1, 1, groups))
    within = Sight(
        pairs=pairs & (rows[..., None] == ids[..., None, :]),
        enter=later,
        state=rows == first[..., None],
        carry=ends[:, :-1] == first,
        occupied=occupied,
    )
    return BlockSight(within, ids == last[..., None], seen & (ends[:, :, None] == ends[:, None, :]))
