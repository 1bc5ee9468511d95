"""Operands and results of attention with shared queries and keys, exact and hashed.

Shape letters: B batch, T queries, S length, H heads, D head width, V value width, R rounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.dtypes import at_least_float32
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


def rotate_pairs(x: Float[Array, "*B H D"], positions: Int[Array, "*B"]) -> Float[Array, "*B H D"]:
    """Rotates neighbouring pairs of features by their positions.

    Features 2i and 2i + 1 are rotated by the angle ``t / 10000^(2i / D)`` (RoFormer,
    arXiv:2104.09864). Position 0 does not change a vector.

    Args:
      x: ``[*B, H, D]`` with D even.
      positions: ``[*B]`` integers.

    Returns:
      ``[*B, H, D]`` in the type of `x`.

    Raises:
      ValueError: if D is odd.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"Rotary positions rotate pairs of features: D must be even, got {width}.")
    frequencies = jnp.asarray(10000.0 ** (-np.arange(0, width, 2) / width), jnp.float32)
    frequencies = frequencies.reshape((1,) * (positions.ndim + 1) + (-1,))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    wide = at_least_float32(x.dtype)
    cos, sin = jnp.cos(angles).astype(wide), jnp.sin(angles).astype(wide)
    even, odd = x[..., 0::2].astype(wide), x[..., 1::2].astype(wide)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


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
