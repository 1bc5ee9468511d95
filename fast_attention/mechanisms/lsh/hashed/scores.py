"""Logits of a block of chunks, with everything that restricts or corrects them.

Shape letters: T queries, S length, R rounds, E chunks done at once, C chunk, W = 2 C keys of a
chunk, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float, Int
from fast_attention.mechanisms.lsh.hashed.sorting import Order
from fast_attention.mechanisms.lsh.hashed.windows import rows_at
from fast_attention.mechanisms.shared_qk import SELF_LOGIT


class Choices(NamedTuple):
    """What is known when the program is compiled.

    Attributes:
      size: positions in a chunk.
      scale: factor of the logits.
      heads: H.
      restricted: whether `Restrictions` say more than that all sees all.
      across: whether a query sees keys of other buckets.
      discount: whether a pair counts once, however often it meets.
      count_borders: whether meetings across the border of two rounds are among those counted.
      dropout_rate: of the weights.
      share_dropout: all rows drop the weights of the same slots.
      precision: of the products.
      blocks: chunks done at once.
      rows: rows done at once.
    """

    size: int
    scale: float
    heads: int
    restricted: bool = False
    across: bool = True
    discount: bool = False
    count_borders: bool = True
    dropout_rate: float = 0.0
    share_dropout: bool = True
    precision: jax.lax.PrecisionLike = None
    blocks: int = 1
    rows: int = 1


class Restrictions(NamedTuple):
    """Who sees whom, for one row: a key is seen if its place is not beyond the query's limit.

    One comparison serves causality, padding and given keys: a position's place and limit are its
    number if causal, else 0; the place of a given key lies before all others, that of a masked key
    behind all; the limit of a masked query before all.

    Attributes:
      place: ``[S]``.
      limit: ``[S]``.
      name: ``[S]``, a query's number; -1 for a masked query, which does not see itself either.
      mask: ``[S, S]`` bool, pairs that see each other, or None.
    """

    place: Int[Array, " S"]
    limit: Int[Array, " S"]
    name: Int[Array, " S"]
    mask: Array | None = None


class Meetings(NamedTuple):
    """Where each position stands in all rounds, to count how often a pair meets.

    Attributes:
      chunk: ``[S, R]``, numbered within the round.
      bucket: ``[S, R]``, or None where pairs meet whatever their buckets.
      chunks: of a round.
    """

    chunk: Int[Array, "S R"]
    bucket: Int[Array, "S R"] | None
    chunks: int


def meetings(order: Order, size: int, across: bool) -> Meetings:
    """Finds the chunks (and buckets) of each position of one row."""
    bucket = None
    if not across:
        bucket = jnp.take_along_axis(order.bucket, order.slot, axis=1).T
    return Meetings((order.slot // size).T, bucket, order.slot.shape[1] // size)


def block_scores(
    query: Float[Array, "E C D"],
    key: Float[Array, "E W D"],
    position: Int[Array, "E W"],
    bucket: Int[Array, "E W"] | None,
    restrictions: Restrictions,
    seen_before: Meetings | None,
    choices: Choices,
) -> tuple[Float[Array, "E C W"], Array]:
    """Computes logits; unseen pairs are -inf.

    The order of corrections is that of the original: pairwise mask, padding, causality, then the
    pair of a position with itself, then buckets and repetitions.

    Args:
      query: the chunks' queries.
      key: the chunks' keys.
      position: of the keys, the first C of which are the queries'.
      bucket: of the keys, likewise.
      restrictions: of the row.
      seen_before: of the row, if repetitions are discounted.
      choices: see there.

    Returns:
      Logits, and which pairs are a position with itself.
    """
    size = choices.size
    scores = jnp.einsum(
        "ecd,ewd->ecw",
        query,
        key,
        precision=choices.precision,
        preferred_element_type=at_least_float32(query.dtype),
    )
    scores = scores * choices.scale
    own = position[:, :size]
    if restrictions.mask is not None:
        pairs = (own[:, :, None], position[:, None, :])
        seen = restrictions.mask.at[pairs].get(mode="promise_in_bounds")
        scores = jnp.where(seen, scores, -jnp.inf)
    name = own
    if choices.restricted:
        limit, place = rows_at(restrictions.limit, own), rows_at(restrictions.place, position)
        scores = jnp.where(limit[:, :, None] >= place[:, None, :], scores, -jnp.inf)
        name = rows_at(restrictions.name, own)
    itself = name[:, :, None] == position[:, None, :]
    scores = jnp.where(itself, SELF_LOGIT, scores)
    if bucket is not None:
        same = bucket[:, :size, None] == bucket[:, None, :]
        scores = jnp.where(same, scores, -jnp.inf)
    if seen_before is not None:
        times = _times_met(own, position, seen_before, choices.count_borders)
        times = times.astype(scores.dtype)
        scores = scores - jnp.log(times + 1e-9)
    return scores, itself


def _times_met(own: Array, position: Array, seen_before: Meetings, count_borders: bool) -> Array:
    """How often each pair meets in all rounds: a chunk sees itself and the chunk before.

    The chunk before the first one of a round is the last of the round before, or of the same round
    if there is but one. Buckets of two rounds are never the same, so that where they matter only
    that one round has a border across which pairs meet.
    """
    times = jnp.zeros((*own.shape, position.shape[-1]), jnp.int32)
    rounds = seen_before.chunk.shape[-1]
    borders = rounds == 1 or (count_borders and seen_before.bucket is None)
    for r in range(rounds):
        chunk = seen_before.chunk[:, r]
        of_query = rows_at(chunk, own)[:, :, None]
        of_key = rows_at(chunk, position)[:, None, :]
        met = ((of_query == of_key) | (of_query == of_key + 1)).astype(jnp.int32)
        if borders:
            before = rows_at(seen_before.chunk[:, r - 1], position)[:, None, :]
            across = (of_query == 0) & (before == seen_before.chunks - 1)
            # Added: a key can stand in both chunks that a query sees.
            met += across.astype(jnp.int32)
        if seen_before.bucket is not None:
            bucket = seen_before.bucket[:, r]
            same = rows_at(bucket, own)[:, :, None] == rows_at(bucket, position)[:, None, :]
            met *= same.astype(jnp.int32)
        times += met
    return times
