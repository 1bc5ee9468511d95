"""Hashed attention: arguments in, attention out.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width, R rounds, J buckets of a round, C chunk.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.lsh.hashed.checks import check_arguments, rounds_of
from fast_attention.mechanisms.lsh.hashed.core import Shared, attend_sorted
from fast_attention.mechanisms.lsh.hashed.hashing import draw_rotations, hash_vectors
from fast_attention.mechanisms.lsh.hashed.scores import Choices, Restrictions
from fast_attention.mechanisms.lsh.hashed.sorting import sort_by_bucket
from fast_attention.mechanisms.lsh.hashed.weights import dense_weights
from fast_attention.mechanisms.lsh.shared_query_key import (
    LSHOutput,
    place_queries,
    rotate_pairs,
    spread_mask,
    unit_keys,
)

# Scores done at once: on a CPU what stays in the cache.
_CPU_SCORES = 2**17
_DEVICE_SCORES = 2**27


def n_buckets(length: int, bucket_size: int) -> int:
    """Buckets of a round: chunks of the length, filled up to an even number of them."""
    return 2 * max(1, math.ceil(length / (2 * bucket_size)))


@functools.partial(
    jax.jit,
    static_argnames=(
        "bucket_size",
        "n_hashes",
        "causal",
        "query_length",
        "allow_duplicate_attention",
        "count_across_rounds",
        "attend_across_buckets",
        "rehash_each_round",
        "drop_for_hash_rate",
        "random_rotations_per_head",
        "hash_masked",
        "rotary",
        "scale",
        "dropout_rate",
        "broadcast_dropout",
        "attn_chunks",
        "precision",
        "return_weights",
        "return_buckets",
    ),
)
@runs_on_auto_axes
def lsh_attention(
    qk: Float[Array, "*B S H D"],
    value: Float[Array, "*B S K V"],
    *,
    rotations: Float[Array, "N D R half"] | None = None,
    key: Array | None = None,
    buckets: Int[Array, "*B H R S"] | None = None,
    bucket_size: int = 64,
    n_hashes: int = 8,
    causal: bool = False,
    query_length: int | None = None,
    allow_duplicate_attention: bool = True,
    count_across_rounds: bool = True,
    attend_across_buckets: bool = True,
    rehash_each_round: bool = True,
    drop_for_hash_rate: float = 0.0,
    random_rotations_per_head: bool = False,
    key_mask: Bool[Array, "*B S"] | None = None,
    hash_masked: bool = False,
    mask: Array | None = None,
    rotary: bool = False,
    positions: Int[Array, "*B T"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    broadcast_dropout: bool = False,
    attn_chunks: int = 1,
    precision: jax.lax.PrecisionLike = None,
    return_weights: bool = False,
    return_buckets: bool = False,
) -> Float[Array, "*B T H V"] | LSHOutput:
    """Attends to what falls into the same or a neighbouring bucket: Reformer, arXiv:2001.04451.

    In each round positions are sorted by their bucket and cut into chunks; a chunk sees itself and
    the chunk before it (before the first stands the last of the round before). One softmax runs
    over all that a query meets in all rounds, which is the merge of rounds by logsumexp:

        out_i = sum_rj P_rij v_j,    P_rij ~ exp(scale q_i . k_j),    k_j = q_j / |q_j|

    The logit of a position with itself is -5e4: it sees itself where it sees nothing else. Time
    and memory are linear in S, for a given ``bucket_size``. Under ``causal`` no gradient reaches
    the future; but the buckets of later positions decide what a chunk holds, so that the future
    can change which of the past is looked at.

    Args:
      qk: ``[*B, S, H, D]``, queries and keys in one: the first T positions ask, all are asked.
      value: ``[*B, S, K, V]``; K divides H.
      rotations: ``[1 or B * H, D, R, J / 2]`` directions to hash with, R = 1 unless
        ``rehash_each_round``; J is the number of buckets, see :func:`n_buckets`.
      key: random key to draw them from, in place of ``rotations``.
      buckets: ``[*B, H, R, S]`` as returned before; nothing is hashed then. So a layer that is
        computed twice does the same twice.
      bucket_size: C, the size of a chunk; on average that of a bucket too.
      n_hashes: R.
      causal: a query sees positions up to its own, and all given keys.
      query_length: T, by default S. Positions from T on are given keys, such as memory or context.
      allow_duplicate_attention: a pair counts in every round in which it meets; otherwise
        ``log(times it meets + 1e-9)`` is taken from its logits, so that it counts once.
      count_across_rounds: count meetings across the border of two rounds, too. The original does
        not: where a pair meets only there, its weight is multiplied by 1e9, and more rounds make
        such pairs more. False is for weights trained with it.
      attend_across_buckets: a query sees all of its two chunks, or only its own bucket there.
      rehash_each_round: a rotation for each round, or else the R best buckets of one.
      drop_for_hash_rate: dropout of the features that are hashed; by ``dropout_key``.
      random_rotations_per_head: draw rotations for every head of every element of the batch.
      key_mask: ``[*B, S]``, False is padding: not seen, and seeing nothing (its output is 0).
      hash_masked: masked positions stand where they hash to and see themselves alone, as in the
        original, so that what they hold shifts the borders of chunks; otherwise they stand behind
        all buckets and give 0.
      mask: broadcastable to ``[*B, H, T, S]``, True sees. A position sees itself, as a last
        resort, even where this says no.
      rotary: rotate pairs of neighbouring features by position, after hashing.
      positions: ``[*B, T]`` of the queries, by default 0, 1, ..; given keys are not rotated.
      scale: of the logits, by default ``D ** -0.5``. Reformer in trax had 1: the keys are of unit
        length already.
      dropout_rate: of the weights; by ``dropout_key``.
      dropout_key: random key, needed where a rate is above 0.
      broadcast_dropout: drop the weights of the same slots in all rows.
      attn_chunks: do the B * H rows in at least so many steps, one after another.
      precision: of the products.
      return_weights: also the weights, as a matrix.
      return_buckets: also the buckets.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of `qk` and `value`; an :class:`LSHOutput` if weights
      or buckets are asked for.

    Raises:
      ValueError: for shapes that do not fit and options that exclude each other.
    """
    chunks = n_buckets(qk.shape[-3], max(1, bucket_size))
    rounds = rounds_of(n_hashes, rehash_each_round, chunks)
    check_arguments(
        qk,
        value,
        rotations=rotations,
        key=key,
        buckets=buckets,
        rounds=rounds,
        n_buckets=chunks,
        query_length=query_length,
        positions=positions,
        key_mask=key_mask,
        bucket_size=bucket_size,
        n_hashes=n_hashes,
        attn_chunks=attn_chunks,
        rates={"dropout_rate": dropout_rate, "drop_for_hash_rate": drop_for_hash_rate},
        dropout_key=dropout_key,
        rotary=rotary,
        discount_repeated=not (allow_duplicate_attention or rehash_each_round),
    )
    *batch, length, heads, width = qk.shape
    queries = length if query_length is None else query_length
    dtype = jnp.result_type(qk, value)
    qk, value = qk.astype(dtype), value.astype(dtype)
    if 0 in (*batch, length):
        return _empty(qk, value, queries, rounds, return_weights, return_buckets)
    elements = math.prod(batch)
    padded, missing = chunks * bucket_size, chunks * bucket_size - length
    weight_key = hash_key = None
    if dropout_key is not None:
        weight_key, hash_key = jax.random.split(dropout_key)

    def rows(x: Array) -> Array:
        return jnp.moveaxis(x, -2, -3).reshape(elements * heads, length, -1)

    if buckets is None:
        hashed = rows(qk)
        if hash_key is not None and drop_for_hash_rate > 0:
            kept = jax.random.bernoulli(hash_key, 1 - drop_for_hash_rate, hashed.shape)
            hashed = jnp.where(kept, hashed / (1 - drop_for_hash_rate), 0)
        if rotations is None:
            assert key is not None  # By check_arguments.
            rotations = draw_rotations(
                key,
                width,
                chunks,
                n_rounds=n_hashes if rehash_each_round else 1,
                rows=elements * heads if random_rotations_per_head else 1,
            )
        buckets = hash_vectors(
            hashed,
            rotations,
            n_hashes=n_hashes,
            rehash_each_round=rehash_each_round,
            precision=precision,
        )
    else:
        buckets = buckets.reshape(elements * heads, rounds, length).astype(jnp.int32)

    visible = None
    if key_mask is not None:
        visible = jnp.broadcast_to(key_mask.astype(bool), (*batch, length)).reshape(-1, length)
    placed = buckets
    if visible is not None and not hash_masked:
        behind = jnp.repeat(~visible, heads, axis=0)[:, None]
        placed = jnp.where(behind, chunks, placed)
    placed = jnp.pad(placed, [(0, 0), (0, 0), (0, missing)], constant_values=chunks)

    shown, own = None, value
    if visible is not None:
        shown = visible.reshape(*batch, length, 1, 1)
        qk, value = jnp.where(shown, qk, 0), jnp.where(shown, value, 0)
    if rotary:
        qk = rotate_pairs(qk, place_queries(positions, (*batch, length), queries))
    value = jnp.repeat(value, heads // value.shape[-2], axis=-2)
    query, values = (jnp.pad(rows(x), [(0, 0), (0, missing), (0, 0)]) for x in (qk, value))
    on_cpu = jax.default_backend() == "cpu"
    scores = 2 * padded * bucket_size
    most = _CPU_SCORES if on_cpu else _DEVICE_SCORES
    choices = Choices(
        size=bucket_size,
        scale=width**-0.5 if scale is None else scale,
        heads=heads,
        restricted=causal or visible is not None or missing > 0,
        across=attend_across_buckets,
        discount=not allow_duplicate_attention,
        count_borders=count_across_rounds,
        dropout_rate=dropout_rate,
        share_dropout=broadcast_dropout,
        precision=precision,
        blocks=max(1, min(chunks, most // (2 * bucket_size**2))),
        rows=max(1, min(most // scores, math.ceil(elements * heads / attn_chunks))),
    )
    shared = Shared(
        sort_by_bucket(placed, chunks + 1),
        _restrictions(visible, mask, (*batch, heads, queries, length), padded, causal),
        weight_key if dropout_rate > 0 else None,
    )
    unit = unit_keys(query)
    attended = attend_sorted(query, unit, values, shared, choices)
    out, weight, largest = attended  # pyright: ignore[reportGeneralTypeIssues]
    out = out[:, :queries].reshape(*batch, heads, queries, -1)
    out = jnp.moveaxis(out, -3, -2).astype(dtype)
    if shown is not None and hash_masked:
        own = jnp.repeat(own, heads // own.shape[-2], axis=-2)
        out = jnp.where(shown[..., :queries, :, :], out, own[..., :queries, :, :])
    if not (return_weights or return_buckets):
        return out
    weights = None
    if return_weights:
        weights = dense_weights(query, unit, weight, largest, shared, choices)
        weights = weights[:, :queries, :length].reshape(*batch, heads, queries, length)
    buckets = buckets.reshape(*batch, heads, rounds, length)
    return LSHOutput(out, weights, buckets if return_buckets else None)


def _empty(
    qk: Array, value: Array, queries: int, rounds: int, return_weights: bool, return_buckets: bool
) -> Array | LSHOutput:
    """What an empty batch or sequence gives: arrays of the right shape without entries."""
    *batch, length, heads, _ = qk.shape
    out = jnp.zeros((*batch, queries, heads, value.shape[-1]), qk.dtype)
    if not (return_weights or return_buckets):
        return out
    weights = jnp.zeros((*batch, heads, queries, length), at_least_float32(qk.dtype))
    buckets = jnp.zeros((*batch, heads, rounds, length), jnp.int32)
    return LSHOutput(out, weights if return_weights else None, buckets if return_buckets else None)


def _restrictions(
    visible: Array | None,
    mask: Array | None,
    shape: tuple[int, ...],
    padded: int,
    causal: bool,
) -> Restrictions:
    """Brings everything that restricts to positions ``0 .. padded``, padding seen by none."""
    queries, length = shape[-2:]
    number = np.arange(padded, dtype=np.int32)
    place = np.where(number < queries, number, -1) if causal else np.zeros_like(number)
    limit = number if causal else np.zeros_like(number)
    seen = jnp.asarray(number < length)[None]
    if visible is not None:
        seen = jnp.pad(visible, [(0, 0), (0, padded - length)])
    place, limit, number = (jnp.asarray(x)[None] for x in (place, limit, number))
    if mask is not None:
        mask = spread_mask(mask, shape)
        missing = [(0, 0), (0, 0), (0, padded - queries), (0, padded - length)]
        mask = jnp.pad(mask, missing, constant_values=True)
    return Restrictions(
        place=jnp.where(seen, place, np.iinfo(np.int32).max),
        limit=jnp.where(seen, limit, -2),
        name=jnp.where(seen, number, -1),
        mask=mask,
    )
