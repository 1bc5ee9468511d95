"""Pairs of a causal chunk whose exponents are too far apart for a product of features.

A row and a key of one chunk weigh ``sum_m exp(a_m) exp(b_m)`` times a factor of the key, where the
scale of the state and the maxima of row and key are taken out: ``a_m <= 0``, ``b_m <= HEADROOM``.
A key whose features exceed those of all keys before the chunk by ``key_max`` nats reaches rows
through features m whose ``a_m`` is as low as ``-key_max``, and those underflow. That loses at most
``exp(key_max)`` times the smallest normal number for each feature: nothing, as long as the row has
a weight near that. The other pairs are *wide*. They are summed on a scale of their own, one key of
each head after the other, in a loop that usually makes no round.

A pair is wide by what its row sees up to its position, so that no later key changes a bit of the
row. Layout and letters are those of :mod:`.chunk_state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.loops import repeat_while, run_if
from fast_attention.linear.state import EMPTY_LOG_SCALE

# Keys inside a chunk are kept this many nats above their own maximum, so that their products with
# queries (at most 1) use float32's range on both sides of 1.
HEADROOM = 40.0

# What a pair may lose for each feature, in nats below the largest weight of its row.
LOST = 27.0


def pair_limit(dtype: jnp.dtype) -> float:
    """Returns the most nats by which ``key_max`` may exceed a row's largest weight."""
    return -math.log(jnp.finfo(dtype).tiny) - LOST


class Exponents(NamedTuple):
    """What makes the exponents of a chunk.

    Attributes:
      of_rows: returns those of all queries, ``[B, K, R, M]``.
      of_keys: returns those of some keys, ``[B, K, N, M]``, given their places in the chunk,
        ``[B, K, N]``.
    """

    of_rows: Callable[[], Array]
    of_keys: Callable[[Array], Array]


class WidePairs(NamedTuple):
    """The pairs of a chunk as exponents.

    Attributes:
      logs: makes exponents anew: kept for a loop that usually makes no round, they would cost time
        and memory.
      scale: of the state, ``[B, K, 1, M]``.
      row_max: largest exponent of each query on that scale, ``[B, K, R]``.
      key_max: that of each key, ``[B, K, C]``.
      seen: bool, broadcastable to ``[B, K, R, C]``.
      decay: logarithm of a factor on pairs, ``[B, K, R, C]``, or None for none.
    """

    logs: Exponents
    scale: Array
    row_max: Array
    key_max: Array
    seen: Array
    decay: Array | None = None

    def among(self, pair_max: Array) -> Array:
        """Returns which pairs are wide beside the largest weights of rows, ``[B, K, R, C]``."""
        over = self.key_max[..., None, :] - pair_max[..., None]
        if self.decay is not None:
            over = over + self.decay
        return self.seen & (over > pair_limit(over.dtype))

    def any(self, pair_max: Array) -> Array:
        """Returns whether there can be such pairs: False only where there are none."""
        if self.decay is not None:
            # XLA on CPU takes a maximum of numbers faster than `any`.
            return jnp.where(self.among(pair_max), 1.0, 0.0).max() > 0
        sees = pair_max > 0.5 * EMPTY_LOG_SCALE
        least = jnp.where(sees, pair_max, jnp.inf).min(axis=-1)
        return jnp.any(self.key_max.max(axis=-1) - least > pair_limit(least.dtype))

    def rows(self) -> Array:
        """Returns exponents of queries on the scale of the state, ``[B, K, R, M]``, at most 0."""
        return self.logs.of_rows() + (self.scale - self.row_max[..., None])

    def next_key(self, pairs: Array, rows: Array) -> tuple[Array, Array]:
        """Picks of each head the first key that has such pairs.

        Args:
          pairs: bool ``[B, K, R, C]``.
          rows: as from :meth:`rows`.

        Returns:
          Those of the pairs that have this key, and the logarithm of each product of features of a
          row and this key, ``[B, K, R, M]``, in units of ``exp(row_max)``.
        """
        chosen = jnp.argmax(pairs.any(axis=-2), axis=-1)[..., None]
        shape = self.key_max.shape
        place = jax.lax.broadcasted_iota(chosen.dtype, shape, len(shape) - 1) == chosen
        terms = rows + (self.logs.of_keys(chosen) - self.scale)
        if self.decay is not None:
            of_key = jnp.take_along_axis(self.decay, chosen[..., None, :], axis=-1)
            terms = terms + of_key
        return pairs & place[..., None, :], terms


def add_wide_pairs(
    wide: WidePairs, products: Array, weights: Array, pair_max: Array, least: Array
) -> tuple[Array, Array]:
    """Corrects the rows that have wide pairs.

    Args:
      wide: the pairs.
      products: of features, ``[B, K, R, C]``.
      weights: in units of ``exp(pair_max)``.
      pair_max: the largest of each row, ``[B, K, R]``, products that vanished taken for the
        smallest normal number.
      least: the least that ``pair_max`` may be.

    Returns:
      The weights, in units of the largest, and its logarithm.
    """

    def correct(_):
        # Of 1 where there is no product: the derivative of the logarithm of 0 is none.
        there = wide.seen & (products > 0)
        logs = jnp.log(jnp.where(there, products, 1)) + (wide.key_max - HEADROOM)[..., None, :]
        if wide.decay is not None:
            logs = logs + wide.decay
        logs = jnp.where(there, logs, -jnp.inf)
        done = jnp.zeros_like(logs, bool)
        rows = wide.rows()

        def pending(carry):
            logs, done = carry
            return wide.among(jnp.maximum(least, logs.max(axis=-1))) & ~done

        def one_key(carry):
            logs, done = carry
            chosen, terms = wide.next_key(pending(carry), rows)
            total = jax.nn.logsumexp(terms, axis=-1)
            return jnp.where(chosen, total[..., None], logs), done | chosen

        carry = vary_alike((logs, done), rows)
        logs, done = repeat_while(
            lambda carry: pending(carry).any(), one_key, carry, wide.key_max.shape[-1]
        )
        largest = jax.lax.stop_gradient(jnp.maximum(least, logs.max(axis=-1)))
        corrected = done.any(axis=-1)
        return (
            jnp.where(corrected[..., None], jnp.exp(logs - largest[..., None]), weights),
            jnp.where(corrected, largest, pair_max),
        )

    return run_if(wide.any(pair_max), correct, (weights, pair_max))


def pull_back_wide_pairs(
    wide: WidePairs,
    pair_max: Array,
    d_weights: Array,
    weights: Array,
    d_rows: Array,
    d_keys: Array,
) -> tuple[Array, Array, Array]:
    """Adds wide pairs to weights without them, and their part to the cotangents of exponents.

    Args:
      wide: the pairs.
      pair_max: largest weight of each row, ``[B, K, R]``.
      d_weights: cotangent of all weights, ``[B, K, R, C]``.
      weights: in units of ``exp(pair_max)``, 0 for wide pairs.
      d_rows: cotangent of ``wide.rows``, of the other pairs.
      d_keys: cotangent of ``wide.keys``, of the other pairs.

    Returns:
      The last three, with wide pairs.
    """

    def correct(carry):
        rows = wide.rows()

        def one_key(carry):
            left, weights, d_rows, d_keys = carry
            chosen, terms = wide.next_key(left, rows)
            row = chosen.any(axis=-1)[..., None]
            terms = jnp.exp(jnp.where(row, terms - pair_max[..., None], -jnp.inf))
            weights = jnp.where(chosen, terms.sum(axis=-1)[..., None], weights)
            d_terms = terms * jnp.where(chosen, d_weights, 0).sum(axis=-1)[..., None]
            key = chosen.any(axis=-2)[..., None]
            d_key = jnp.where(key, d_terms.sum(axis=-2)[..., None, :], 0)
            return left & ~chosen, weights, d_rows + d_terms, d_keys + d_key

        carry = vary_alike((wide.among(pair_max), *carry), rows)
        most = wide.key_max.shape[-1]
        return repeat_while(lambda carry: carry[0].any(), one_key, carry, most)[1:]

    return run_if(wide.any(pair_max), correct, (weights, d_rows, d_keys))
