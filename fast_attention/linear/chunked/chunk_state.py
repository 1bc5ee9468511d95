"""A chunk of keys into a state, and queries out of it.

Everything here sees small arrays in the layout ``[B, K, positions, width]``; queries of the G heads
that share a key head are stacked along positions (R = G * C rows). Shape letters: B batch, K
key/value heads, R query rows, C keys, V value width, M features, N = M or 1 log-scales.

Stabilisers (maxima) never look past the row they serve, so the future cannot reach the past, not
even by rounding. They cancel in the result and are constants in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear.chunked.chunk_decay import ChunkDecay
from fast_attention.linear.chunked.reductions import row_max
from fast_attention.linear.rounded_products import Einsum
from fast_attention.linear.state import EMPTY_LOG_SCALE, LinearAttentionState


class Absorbed(NamedTuple):
    """Keys of a chunk on the scale of the state after it.

    Attributes:
      source: the features given, without the keys that do not enter.
      features: ``[B, K, C, M]``, at most 1 for exponential maps.
      shift: what was added to their logarithms, ``[B, K, 1, N]``, or None.
      decay: factor on the state before the chunk, ``[B, K, N]``, or None for 1.
      log_scale: the new scale.
      gain: factor on keys of maps without exponents, ``[B, K, C]``, or None for 1.
    """

    source: Features
    features: Array
    shift: Array | None
    decay: Array | None
    log_scale: Array | None
    gain: Array | None = None


class Read(NamedTuple):
    """Scaled queries, and the state they read, ``[B, K, ...]``.

    Attributes:
      features: queries times the scale of the state, ``[B, K, R, M]``.
      shift: what was added to their logarithms, ``[B, K, R, N]``, or None.
      row_max: largest logarithm in each row before the shift, ``[B, K, R]``, or None.
      scale: of the state, 0 where it is empty, ``[B, K, 1, N]``, or None.
    """

    features: Array
    shift: Array | None
    row_max: Array | None
    scale: Array | None


def absorb_keys(
    state: LinearAttentionState,
    keys: Features,
    enter: Array | None = None,
    keep: Array | None = None,
    log_scale: Array | None = None,
    fading: ChunkDecay | None = None,
) -> Absorbed:
    """Brings key features to the scale the state has after these keys.

    Args:
      state: the state before them.
      keys: their features.
      enter: which keys to add, see :class:`Sight`; None for all. Without ``keep`` those left out
        must be in ``state``.
      keep: where the state before survives, broadcastable to ``[B, K]``; None for everywhere.
      log_scale: the scale after them, where it is known already.
      fading: decay of the chunk, or None.
    """
    if keys.log is None:
        assert keys.values is not None
        features, decay = keys.values, None
        if enter is not None:
            features = jnp.where(enter[..., None], features, 0)
        if keep is not None:
            decay = keep[..., None].astype(features.dtype)
        source = Features(features, None)
        if fading is None:
            return Absorbed(source, features, None, decay, None)
        left = jnp.exp(fading.whole)[..., None]
        gain = jnp.exp(fading.keys)
        decay = left if decay is None else decay * left
        return Absorbed(source, features * gain[..., None], None, decay, None, gain)
    assert state.log_scale is not None
    before, log = lax.stop_gradient(state.log_scale), keys.log
    if fading is not None:
        before, log = before + fading.whole[..., None], log + fading.keys[..., None]
    candidates = log
    if keep is not None:
        before = jnp.where(keep[..., None], before, EMPTY_LOG_SCALE)
    if enter is not None:
        log = jnp.where(enter[..., None], log, -jnp.inf)
    if log_scale is None:
        # Without segments only the first key is left out, and the scale before knows it.
        candidates = candidates if keep is None else log
        log_scale = lax.stop_gradient(jnp.maximum(before, candidates.max(axis=-2)))
    shift = -log_scale[..., None, :]
    decay = jnp.exp(before - log_scale)
    if keep is not None:
        # An empty scale on both sides would give exp(0).
        decay = jnp.where(keep[..., None], decay, 0)
    source = Features(keys.values, log)
    return Absorbed(source, source.shift(shift), shift, decay, log_scale)


def next_state(
    state: LinearAttentionState, absorbed: Absorbed, value: Array, einsum: Einsum
) -> LinearAttentionState:
    """Returns the state after a chunk of keys."""
    kv = einsum("bkcv,bkcm->bkvm", value, absorbed.features)
    k_sum = absorbed.features.sum(axis=-2)
    if absorbed.decay is None:
        return LinearAttentionState(state.kv + kv, state.k_sum + k_sum, absorbed.log_scale)
    return LinearAttentionState(
        state.kv * absorbed.decay[..., None, :] + kv,
        state.k_sum * absorbed.decay + k_sum,
        absorbed.log_scale,
    )


def read_state(
    log_scale: Array | None,
    queries: Features,
    largest: Array | None = None,
    occupied: bool = False,
) -> Read:
    """Brings queries to the scale of a state; each row's largest entry becomes 1.

    That ``largest`` entry, the row's ``row_max``, is looked for unless it is given. ``occupied``
    states that the state has a key.
    """
    if queries.log is None:
        return Read(queries.shift(None), None, None, None)
    assert log_scale is not None
    scale = lax.stop_gradient(log_scale)[..., None, :]
    if not occupied:
        # The scale of an empty state has no meaning: 0 leaves logarithms unchanged.
        scale = jnp.where(scale > 0.5 * EMPTY_LOG_SCALE, scale, 0)
    if largest is None:
        largest = lax.stop_gradient(row_max(queries.log + scale))
    shift = scale - largest[..., None]
    return Read(queries.shift(shift), shift, largest, scale)
