"""All rounds of one row, forward: an online softmax over everything a query meets.

Merging rounds by the logsumexp of their logits is the softmax over all pairs of all rounds at once,
a pair counted as often as it meets. So rounds only carry a maximum, a sum of weights and a weighted
sum of values, and nothing but the first two is needed to find any weight again.

The logarithm of the sum is never added to the maximum: where a position sees itself alone, its
logits are -5e4, and float32 has no digits left there for the rest.

Shape letters: S length, D head width, V value width, R rounds, E chunks done at once, C chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Float
from fast_attention.mechanisms.lsh.hashed.scores import (
    Choices,
    Restrictions,
    block_scores,
    meetings,
)
from fast_attention.mechanisms.lsh.hashed.sorting import Order
from fast_attention.mechanisms.lsh.hashed.windows import (
    Windows,
    fold_key,
    make_windows,
    rows_at,
    unsort,
)


class Row(NamedTuple):
    """What is attended in one row, a head of one element of the batch.

    Attributes:
      query: ``[S, D]``.
      key: ``[S, D]``, of unit length.
      value: ``[S, V]``.
      order: of its buckets.
      restrictions: who sees whom.
      dropout_key: random key, or None.
    """

    query: Float[Array, "S D"]
    key: Float[Array, "S D"]
    value: Float[Array, "S V"]
    order: Order
    restrictions: Restrictions
    dropout_key: Array | None


class Sums(NamedTuple):
    """The softmax of every query so far.

    Attributes:
      value: ``[S, V]``, values weighted by ``exp(logit - largest)``.
      weight: ``[S]``, the sum of these weights.
      largest: ``[S]``, -inf where nothing is seen.
    """

    value: Float[Array, "S V"]
    weight: Float[Array, " S"]
    largest: Float[Array, " S"]


def windows_of(row: Row, choices: Choices) -> Windows:
    """The windows of a row, with buckets where they matter."""
    # One bucket more than there are, for masked positions.
    n_buckets = None if choices.across else row.order.slot.shape[1] // choices.size + 1
    return make_windows(row.order, n_buckets, choices.size, choices.blocks)


def scores_of(row: Row, choices: Choices):
    """Returns the function from windows ``[E, W]`` to queries, keys, logits and self-pairs."""
    met = meetings(row.order, choices.size, choices.across) if choices.discount else None

    def scores(window: Windows) -> tuple[Array, Array, Array, Array]:
        query = rows_at(row.query, window.position[:, : choices.size])
        key = rows_at(row.key, window.position)
        logits, itself = block_scores(
            query, key, window.position, window.bucket, row.restrictions, met, choices
        )
        return query, key, logits, itself

    return scores


def kept(key: Array | None, weights: Array, choices: Choices) -> Array | None:
    """Draws factors of the weights, 0 or ``1 / (1 - rate)``; None without dropout."""
    if key is None:
        return None
    keep = 1 - choices.dropout_rate
    kept = jax.random.bernoulli(key, keep, weights.shape)
    return kept.astype(weights.dtype) / max(keep, 1e-6)


def attend_rounds(row: Row, choices: Choices) -> Sums:
    """Attends in all rounds.

    Args:
      row: the row.
      choices: see there.

    Returns:
      The sums over all rounds, float32 at least.
    """
    scores = scores_of(row, choices)
    compute = at_least_float32(row.query.dtype)

    def attend_block(key: Array | None, operands: tuple[Windows, Array]) -> Sums:
        window, number = operands
        logits = scores(window)[2]
        largest = jnp.max(logits, axis=-1)
        weights = jnp.exp(logits - finite(largest)[..., None])
        total = jnp.sum(weights, axis=-1)
        factors = kept(fold_key(key, number), weights, choices)
        weights = weights if factors is None else weights * factors.astype(weights.dtype)
        value = jnp.einsum(
            "ecw,ewv->ecv",
            weights.astype(row.value.dtype),
            rows_at(row.value, window.position),
            precision=choices.precision,
            preferred_element_type=compute,
        )
        return Sums(value, total, largest)

    def attend_round(sums: Sums, operands: tuple[Windows, Array, Array]):
        windows, slot, number = operands
        key = fold_key(row.dropout_key, number)
        blocks = (windows, jnp.arange(len(windows.position)))
        found = lax.map(functools.partial(attend_block, key), blocks)
        return _merge(sums, Sums(*(unsort(x, slot) for x in found))), None

    length = len(row.query)
    start = Sums(
        jnp.zeros((length, row.value.shape[-1]), compute),
        jnp.zeros(length, compute),
        jnp.full(length, -jnp.inf, compute),
    )
    start = vary_alike(start, row)
    rounds = jnp.arange(len(row.order.slot))
    return lax.scan(attend_round, start, (windows_of(row, choices), row.order.slot, rounds))[0]


def finite(largest: Array) -> Array:
    """Replaces -inf, the maximum of nothing, by what can be subtracted from -inf."""
    return jnp.where(largest == -jnp.inf, 0, largest)


def _merge(a: Sums, b: Sums) -> Sums:
    largest = jnp.maximum(a.largest, b.largest)
    factor_a = jnp.exp(a.largest - finite(largest))
    factor_b = jnp.exp(b.largest - finite(largest))
    return Sums(
        a.value * factor_a[:, None] + b.value * factor_b[:, None],
        a.weight * factor_a + b.weight * factor_b,
        largest,
    )
