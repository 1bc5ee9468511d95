"""Which positions meet: every chunk of the sorted order with itself and the chunk before it.

Shape letters: R rounds, S length, G chunks in a round, C chunk, E chunks done at once, W = 2 C
the keys of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Int
from fast_attention.mechanisms.lsh.hashed.sorting import Order


class Windows(NamedTuple):
    """The positions of all chunks of one row, in blocks.

    Attributes:
      position: ``[R, blocks, E, W]``: the chunk's own positions, then those of the chunk before;
        blocks beyond the last chunk are filled up with position 0.
      bucket: as ``position``, numbered through all rounds; None if it does not matter.
    """

    position: Int[Array, "R blocks E W"]
    bucket: Int[Array, "R blocks E W"] | None


def make_windows(order: Order, n_buckets: int | None, size: int, at_once: int) -> Windows:
    """Cuts the order of one row into chunks with their keys.

    Before the first chunk of a round stands the last one of the round before, and before the first
    round the last.

    Args:
      order: of one row, ``[R, S]``.
      n_buckets: of a round, or None where buckets do not matter.
      size: C, a divisor of S.
      at_once: E.

    Returns:
      The windows.
    """

    def cut(x: Array) -> Array:
        rounds = len(x)
        own = x.reshape(-1, size)
        keys = jnp.concatenate([own, jnp.roll(own, 1, axis=0)], axis=1)
        keys = keys.reshape(rounds, -1, 2 * size)
        missing = -keys.shape[1] % at_once
        keys = jnp.pad(keys, [(0, 0), (0, missing), (0, 0)])
        return keys.reshape(rounds, -1, at_once, 2 * size)

    if n_buckets is None:
        return Windows(cut(order.position), None)
    first = n_buckets * jnp.arange(len(order.bucket), dtype=jnp.int32)[:, None]
    return Windows(cut(order.position), cut(order.bucket + first))


def rows_at(x: Array, index: Array) -> Array:
    """Takes ``x[index]`` along the first axis, where every index is known to be in range."""
    return x.at[index].get(mode="promise_in_bounds")


def unsort(x: Array, slot: Array) -> Array:
    """Brings a round's ``[blocks, E, C, ..]`` back to the order of positions, ``[S, ..]``."""
    return rows_at(x.reshape(-1, *x.shape[3:]), slot)


def fold_key(key: Array | None, number: Array | int) -> Array | None:
    """Derives a random key, if there is one."""
    return None if key is None else jax.random.fold_in(key, number)
