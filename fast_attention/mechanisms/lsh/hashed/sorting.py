"""Positions in the order of their buckets, and back.

Shape letters: N rows, R rounds, S length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.types import Array, Int


class Order(NamedTuple):
    """The order of one or many rows.

    Attributes:
      position: ``[*N, R, S]``, position that stands in each slot of a round.
      slot: ``[*N, R, S]``, slot where each position stands.
      bucket: ``[*N, R, S]``, bucket of each slot.
    """

    position: Int[Array, "*N R S"]
    slot: Int[Array, "*N R S"]
    bucket: Int[Array, "*N R S"]


def sort_by_bucket(buckets: Int[Array, "*N R S"], n_buckets: int) -> Order:
    """Sorts the positions of every round by bucket, and by position within a bucket.

    Args:
      buckets: ``[*N, R, S]`` int32, numbers below ``n_buckets``.
      n_buckets: how many there can be.

    Returns:
      The order, int32.
    """
    axis, length = buckets.ndim - 1, buckets.shape[-1]
    position = lax.broadcasted_iota(jnp.int32, buckets.shape, axis)
    bits = (length - 1).bit_length()
    if bits + (n_buckets - 1).bit_length() <= 31:
        # Bucket and position in one number sort several times faster than a pair of them.
        both = lax.sort(buckets << bits | position, dimension=axis, is_stable=False)
        bucket, position = both >> bits, both & (2**bits - 1)
    else:
        bucket, position = lax.sort((buckets, position), dimension=axis, num_keys=2)
    return Order(position, _inverse(position), bucket)


def _inverse(permutation: Array) -> Array:
    """Inverts permutations along the last axis."""
    flat = permutation.reshape(-1, permutation.shape[-1])
    row = lax.broadcasted_iota(jnp.int32, flat.shape, 0)
    place = lax.broadcasted_iota(jnp.int32, flat.shape, 1)
    inverse = (
        jnp.zeros_like(flat).at[row, flat].set(place, mode="promise_in_bounds", unique_indices=True)
    )
    return inverse.reshape(permutation.shape)
