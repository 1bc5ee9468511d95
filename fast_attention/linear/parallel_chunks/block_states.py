"""The states between the chunks of a block, all at once.

Each chunk's keys make a state of their own, a *source*; so does what was seen before the block. The
state at a *point* (before each chunk, and after the last) is the sum of the sources before it, each
brought to the scale of the point, the largest of theirs: nothing overflows, no later source reaches
an earlier point, and errors do not add up from chunk to chunk.

Shape letters: B batch times key/value heads, N chunks of a block, C chunk, V value width,
M features, L = M or 1 log-scales.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear.chunked.chunk_state import Absorbed, absorb_keys
from fast_attention.linear.rounded_products import Einsum
from fast_attention.linear.state import EMPTY_LOG_SCALE, LinearAttentionState


class BlockStates(NamedTuple):
    """The states of a block.

    Attributes:
      absorbed: the keys of each chunk on the scale of their source, ``[B, N, C, M]``.
      factor: from sources (the state before the block, and each chunk) to points,
        ``[B, N + 1, N + 1, L]``; 0 for a source that the point does not see.
      before: the state before each chunk, ``[B, N, ...]``.
      after: the state after the block, ``[B, ...]``.
    """

    absorbed: Absorbed
    factor: Array
    before: LinearAttentionState
    after: LinearAttentionState


def block_states(
    state: LinearAttentionState,
    keys: Features,
    value: Array,
    enter: Array | None,
    seen: Array,
    einsum: Einsum,
) -> BlockStates:
    """Returns the states between chunks.

    Args:
      state: the one before the block, ``[B, ...]``.
      keys: features, ``[B, N, C, ...]``.
      value: ``[B, N, C, V]``.
      enter: bool ``[B, N, C]``, which keys outlive their chunk; None for all.
      seen: bool ``[B or 1, N + 1, N + 1]``, which point sees which source.
      einsum: the matrix products.
    """
    log_scale = None
    if keys.log is not None:
        log = keys.log if enter is None else jnp.where(enter[..., None], keys.log, -jnp.inf)
        log_scale = lax.stop_gradient(jnp.maximum(EMPTY_LOG_SCALE, log.max(axis=-2)))
    nothing = LinearAttentionState(state.kv, state.k_sum, log_scale)
    absorbed = absorb_keys(nothing, keys, enter, log_scale=log_scale)
    kv = einsum("bkcv,bkcm->bkvm", value, absorbed.features)
    chunks = LinearAttentionState(kv, absorbed.features.sum(axis=-2), log_scale)
    return BlockStates(absorbed, *states_at_points(state, chunks, seen))


def states_at_points(
    state: LinearAttentionState, sources: LinearAttentionState, seen: Array
) -> tuple[Array, LinearAttentionState, LinearAttentionState]:
    """Returns the factors, the state before each source, and the one after the last.

    Args:
      state: the one before the first source, ``[B, ...]``.
      sources: ``[B, N, ...]``.
      seen: bool ``[B or 1, N + 1, N + 1]``, which point sees which source.
    """
    seen, points = seen[..., None], None
    if sources.log_scale is None:
        factor = seen.astype(state.kv.dtype)
    else:
        assert state.log_scale is not None
        scales = jnp.concatenate([state.log_scale[:, None], sources.log_scale], axis=1)[:, None]
        scales = lax.stop_gradient(jnp.where(seen, scales, -jnp.inf))
        points = jnp.maximum(EMPTY_LOG_SCALE, scales.max(axis=2))
        factor = jnp.exp(scales - points[:, :, None])

    def at(point: slice) -> LinearAttentionState:
        first, rest = factor[:, point, :1], factor[:, point, 1:]
        kv = (rest[:, :, :, None] * sources.kv[:, None]).sum(axis=2)
        k_sum = (rest * sources.k_sum[:, None]).sum(axis=2)
        return LinearAttentionState(
            first * state.kv[:, None] + kv,
            first[:, :, 0] * state.k_sum[:, None] + k_sum,
            None if points is None else points[:, point],
        )

    before, last = at(slice(None, -1)), at(slice(-1, None))
    after = jax.tree.map(lambda x: x[:, 0], last)
    return factor, before, after


def pull_back_states(
    factor: Array, before: tuple[Array, Array], after: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns the cotangents of sources, given those of the states at points.

    Args:
      factor: of :class:`BlockStates`.
      before: cotangents of ``kv`` and ``k_sum`` before each chunk, ``[B, N, ...]``.
      after: of those after the block, ``[B, ...]``.

    Returns:
      Cotangents of ``kv`` and ``k_sum`` of the state before the block, ``[B, ...]``, and of those
      of each chunk, ``[B, N, ...]``.
    """

    def of(source: slice) -> tuple[Array, Array]:
        inner, last = factor[:, :-1, source], factor[:, -1, source]
        return (
            (inner[:, :, :, None] * before[0][:, :, None]).sum(axis=1)
            + last[:, :, None] * after[0][:, None],
            (inner * before[1][:, :, None]).sum(axis=1) + last * after[1][:, None],
        )

    first, chunks = of(slice(None, 1)), of(slice(1, None))
    return (first[0][:, 0], first[1][:, 0]), chunks
