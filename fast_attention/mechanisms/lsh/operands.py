"""Operands and results of attention with shared queries and keys, exact and hashed.

Shape letters: B batch, T queries, S length, H heads, D head width, V value width, R rounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float, Int
from fast_attention.mechanisms.checks import full_rank


class LSHOutput(NamedTuple):
    """Attention with the requested weights (float32, before dropout) and buckets.

    Attributes:
      out: ``[*B, T, H, V]``.
      weights: ``[*B, H, T, S]``, or None.
      buckets: ``[*B, H, R, S]`` int32, numbers within their rounds, or None.
    """

    out: Float[Array, "*B T H V"]
    weights: Float[Array, "*B H T S"] | None
    buckets: Int[Array, "*B H R S"] | None


def place_queries(positions: Array | None, shape: tuple[int, ...], queries: int) -> Array:
    """Positions ``[*B, S]`` for :func:`rotate_pairs`: those given for queries, then zeros."""
    *batch, length = shape
    if positions is None:
        positions = jnp.arange(queries).reshape((1,) * len(batch) + (-1,))
    if positions.ndim != len(shape):
        raise ValueError(f"positions must have shape {(*batch, queries)}, got {positions.shape}.")
    place = jnp.broadcast_to(positions, (*batch, queries))
    return jnp.pad(place, [(0, 0)] * len(batch) + [(0, length - queries)])


def spread_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """Brings a mask that broadcasts to ``[*B, H, T, S]`` to ``[B or 1, H or 1, T, S]`` bool."""
    mask = full_rank("mask", mask, shape).astype(bool)
    shared = math.prod(mask.shape[:-3]) == 1
    leading = (1,) * len(shape[:-3]) if shared else shape[:-3]
    mask = jnp.broadcast_to(mask, (*leading, mask.shape[-3], *shape[-2:]))
    return mask.reshape(-1, *mask.shape[-3:])
