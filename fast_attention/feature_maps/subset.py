"""Some positions of a sequence, spread over it, that stand for all of it.

Shape letters: B batch, N positions, P positions taken, K key/value heads, G queries of a key head,
D head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Bool, Float

_JITTER_BITS = 12


def spread_out(
    x: Float[Array, "B N K G D"], visible: Bool[Array, "B N #K"] | None, most: int
) -> tuple[Float[Array, "B P K G D"], Bool[Array, "B P #K"] | None]:
    """Takes one visible position from each of P = ``most`` equal stretches of the visible ones.

    Which one is a matter of its rank among the visible positions and of their number alone: what
    lies between them, and the length with padding, changes nothing. Within its stretch it is picked
    by a fixed sequence that is no multiple of anything, so that data of any period are met at all
    their phases. Where no more than P are visible all of them are taken.

    Args:
      x: vectors.
      visible: which count, None for all; an axis of length 1 stands for all K.
      most: P, less than N.

    Returns:
      Vectors and, if a mask was given, which of them count.
    """
    length = x.shape[1]
    if visible is None:
        ranks = np.asarray(_ranks(np.int32(length), most))
        return jnp.take(x, ranks, axis=1, indices_are_sorted=True), None
    one_head = functools.partial(_visible_places, most=most)
    # [B, N, K] -> [B, P, K]
    places, taken = jax.vmap(jax.vmap(one_head, -1, -1))(visible)
    if places.shape[-1] == 1:
        picked = jax.vmap(lambda row, place: row[place])(x, places[..., 0])
    else:
        picked = jnp.take_along_axis(x, places[..., None, None], axis=1)
    return picked, taken


def _visible_places(visible: Array, most: int) -> tuple[Array, Array]:
    """Returns positions ``[P]`` of those chosen of ``[N]``, and which of them there are."""
    length = visible.shape[0]
    rank = jnp.cumsum(visible, dtype=jnp.int32) - 1
    count = rank[-1] + 1
    # The place of each rank; hidden positions are written nowhere.
    at = jnp.full(length, 0, jnp.int32)
    number = jnp.arange(length, dtype=jnp.int32)
    at = at.at[jnp.where(visible, rank, length)].set(number, mode="drop")
    first = jnp.arange(most, dtype=jnp.int32)
    taken = first < count
    ranks = jnp.where(count > most, _ranks(count, most), first)
    return at[jnp.where(taken, ranks, 0)], taken


def _ranks(count, most: int):
    """Returns ``most`` ranks below ``count >= most``, one from each stretch, ``[P]``."""
    number = np.arange(most, dtype=np.int32)
    whole, rest = count // most, count % most
    # number * count // most, without its overflow.
    start = number * whole + number * rest // most
    following = number + 1
    width = following * whole + following * rest // most - start
    jitter = np.floor((number * (5**0.5 - 1) / 2 % 1) * 2**_JITTER_BITS).astype(np.int32)
    return start + (jitter * width >> _JITTER_BITS)
