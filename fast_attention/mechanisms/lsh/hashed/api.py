"""Hashed attention: arguments, checks and results.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width, R rounds, J buckets of a round, C chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.lsh.hashed.checks import check_arguments
from fast_attention.mechanisms.lsh.hashed.core import Shared, attend_plainly, attend_sorted
from fast_attention.mechanisms.lsh.hashed.hashing import draw_rotations, hash_vectors
from fast_attention.mechanisms.lsh.hashed.options import Hashing
from fast_attention.mechanisms.lsh.hashed.scores import Choices, Restrictions
from fast_attention.mechanisms.lsh.hashed.sorting import sort_by_bucket
from fast_attention.mechanisms.lsh.hashed.weights import dense_weights
from fast_attention.mechanisms.lsh.operands import LSHOutput, place_queries, spread_mask
from fast_attention.mechanisms.rotary import rotate
from fast_attention.mechanisms.shared_qk import unit_keys

# Scores done at once: on a CPU what stays in the cache.
_CPU_SCORES = 2**17
_DEVICE_SCORES = 2**27


def n_buckets(length: int, bucket_size: int) -> int:
    """Buckets of a round: chunks of the length, filled up to an even number of them."""
    return 2 * max(1, math.ceil(length / (2 * bucket_size)))


@runs_on_auto_axes
def lsh_attention(
    qk: Float[Array, "*B S H D"],
    value: Float[Array, "*B S K V"],
    key: Array,
    *,
    causal: bool = False,
    query_length: int | None = None,
    key_mask: Bool[Array, "*B S"] | None = None,
    mask: Array | None = None,
    positions: Int[Array, "*B T"] | None = None,
    dropout: Dropout | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_weights: bool = False,
    return_buckets: bool = False,
    **options: Any,
) -> Float[Array, "*B T H V"] | LSHOutput:
    """Attends to keys in the same or a neighbouring bucket: Reformer, arXiv:2001.04451.

    In each round positions are sorted by their bucket and split into chunks; a chunk sees itself
    and the previous chunk (for the first one, the last chunk of the previous round). One softmax is
    over all keys that a query sees in all rounds, which equals merging the rounds by logsumexp:

        out_i = sum_rj P_rij v_j,    P_rij ~ exp(scale q_i . k_j),    k_j = q_j / |q_j|

    The logit of a position with itself is -5e4: it sees itself only if it sees nothing else. Time
    and memory are linear in S, for a given bucket size. With ``causal``, no gradient reaches later
    positions. But the buckets of later positions affect the chunks, so they can change which
    earlier positions are seen.

    Args:
      qk: ``[*B, S, H, D]``, shared queries and keys: the first T positions are queries, all are
        keys.
      value: ``[*B, S, K, V]``; K divides H.
      key: source of the buckets: a typed random key (``jax.random.key``) from which the hash
        directions are drawn; or the directions, floating ``[1 or B * H, D, R, J / 2]``, R = 1
        unless ``rehash_each_round``, J the number of buckets, see :func:`n_buckets`; or integers
        ``[*B, H, R, S]``, the buckets of an earlier call, so that a recomputed layer gives the same
        result.
      causal: a query sees positions up to its own, and all given keys.
      query_length: T, by default S. Positions from T on are given keys, such as memory or context.
      key_mask: ``[*B, S]``, False is padding: it is not attended to, and its output is 0.
      mask: broadcastable to ``[*B, H, T, S]``, True sees. A position with no other key sees itself,
        even if this is False.
      positions: ``[*B, T]`` of the queries for ``rotary``, by default 0, 1, ..; given keys
        are not rotated.
      dropout: of the weights and, by ``drop_for_hash_rate``, of the features that are hashed; its
        rate may be 0. With ``broadcast`` the weights of the same slots are dropped in all rows.
      precision: of the products.
      return_weights: return an :class:`LSHOutput` with the weights, as a matrix.
      return_buckets: return an :class:`LSHOutput` with the buckets.
      **options: fields of :class:`Hashing`, such as ``bucket_size=64, n_hashes=8``.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of `qk` and `value`, or an :class:`LSHOutput`.

    Raises:
      TypeError: for an option that :class:`Hashing` does not have.
      ValueError: for shapes that do not fit.
    """
    hashing = Hashing(**options)
    chunks = n_buckets(qk.shape[-3], hashing.bucket_size)
    kinds = jnp.floating, jnp.integer, jax.dtypes.prng_key
    rotations, buckets, drawn = (key if jnp.issubdtype(key.dtype, k) else None for k in kinds)
    check_arguments(
        qk,
        value,
        hashing,
        rotations=rotations,
        buckets=buckets,
        n_buckets=chunks,
        query_length=query_length,
        positions=positions,
        key_mask=key_mask,
        dropout=dropout,
    )
    if dropout is None:
        dropout_key, rate, broadcast = None, 0.0, True
    else:
        dropout_key, rate, broadcast = dropout
    setting = _Setting(hashing, causal, query_length, rate, broadcast, precision, return_weights)
    arrays = _Arrays(qk, value, rotations, drawn, buckets, key_mask, mask, positions, dropout_key)
    found = _attend(setting, arrays)
    return found if return_weights or return_buckets else found.out


class _Setting(NamedTuple):
    """The static options of a call."""

    hashing: Hashing
    causal: bool
    query_length: int | None
    dropout_rate: float
    share_dropout: bool
    precision: jax.lax.PrecisionLike
    return_weights: bool


class _Arrays(NamedTuple):
    qk: Array
    value: Array
    rotations: Array | None
    key: Array | None
    buckets: Array | None
    key_mask: Array | None
    mask: Array | None
    positions: Array | None
    dropout_key: Array | None


# Compiled as one: called outside jit, the loops inside would be compiled anew in every call.
@functools.partial(jax.jit, static_argnums=0)
def _attend(setting: _Setting, arrays: _Arrays) -> LSHOutput:
    hashing, bucket_size = setting.hashing, setting.hashing.bucket_size
    qk, value, key_mask, mask = arrays.qk, arrays.value, arrays.key_mask, arrays.mask
    chunks = n_buckets(qk.shape[-3], bucket_size)
    rounds = hashing.rounds(chunks)
    *batch, length, heads, width = qk.shape
    queries = length if setting.query_length is None else setting.query_length
    dtype = jnp.result_type(qk, value)
    qk, value = qk.astype(dtype), value.astype(dtype)
    if 0 in (*batch, length):
        return _empty(qk, value, queries, rounds, setting.return_weights)
    elements = math.prod(batch)
    padded, missing = chunks * bucket_size, chunks * bucket_size - length
    weight_key = hash_key = None
    if arrays.dropout_key is not None:
        weight_key, hash_key = jax.random.split(arrays.dropout_key)

    def rows(x: Array) -> Array:
        return jnp.moveaxis(x, -2, -3).reshape(elements * heads, length, -1)

    buckets = _buckets(rows(qk), setting, arrays, hash_key)
    visible = None
    if key_mask is not None:
        visible = jnp.broadcast_to(key_mask.astype(bool), (*batch, length)).reshape(-1, length)
    placed = buckets
    if visible is not None and not hashing.hash_masked:
        behind = jnp.repeat(~visible, heads, axis=0)[:, None]
        placed = jnp.where(behind, chunks, placed)
    placed = jnp.pad(placed, [(0, 0), (0, 0), (0, missing)], constant_values=chunks)

    shown, own = None, value
    if visible is not None:
        shown = visible.reshape(*batch, length, 1, 1)
        qk, value = jnp.where(shown, qk, 0), jnp.where(shown, value, 0)
    if hashing.rotary:
        place = place_queries(arrays.positions, (*batch, length), queries)
        qk = rotate(qk, place, interleaved=True)
    value = jnp.repeat(value, heads // value.shape[-2], axis=-2)
    query, values = (jnp.pad(rows(x), [(0, 0), (0, missing), (0, 0)]) for x in (qk, value))
    on_cpu = jax.default_backend() == "cpu"
    scores = 2 * padded * bucket_size
    most = _CPU_SCORES if on_cpu else _DEVICE_SCORES
    choices = Choices(
        size=bucket_size,
        scale=width**-0.5 if hashing.scale is None else hashing.scale,
        heads=heads,
        restricted=setting.causal or visible is not None or missing > 0,
        across=hashing.attend_across_buckets,
        discount=not hashing.allow_duplicate_attention,
        count_borders=hashing.count_across_rounds,
        dropout_rate=setting.dropout_rate,
        share_dropout=setting.share_dropout,
        precision=setting.precision,
        blocks=max(1, min(chunks, most // (2 * bucket_size**2))),
        rows=max(1, min(most // scores, math.ceil(elements * heads / hashing.attn_chunks))),
    )
    shared = Shared(
        sort_by_bucket(placed, chunks + 1),
        _restrictions(visible, mask, (*batch, heads, queries, length), padded, setting.causal),
        weight_key if setting.dropout_rate > 0 else None,
    )
    unit = unit_keys(query)
    attend = attend_plainly if hashing.implementation == "reference" else attend_sorted
    attended = attend(query, unit, values, shared, choices)
    out, weight, largest = attended  # pyright: ignore[reportGeneralTypeIssues]
    out = out[:, :queries].reshape(*batch, heads, queries, -1)
    out = jnp.moveaxis(out, -3, -2).astype(dtype)
    if shown is not None and hashing.hash_masked:
        own = jnp.repeat(own, heads // own.shape[-2], axis=-2)
        out = jnp.where(shown[..., :queries, :, :], out, own[..., :queries, :, :])
    weights = None
    if setting.return_weights:
        weights = dense_weights(query, unit, weight, largest, shared, choices)
        weights = weights[:, :queries, :length].reshape(*batch, heads, queries, length)
    buckets = buckets.reshape(*batch, heads, rounds, length)
    return LSHOutput(out, weights, buckets)


def _buckets(
    vectors: Array, setting: _Setting, arrays: _Arrays, drop_key: Array | None
) -> Int[Array, "N R S"]:
    """Hashes vectors ``[N, S, D]``, unless buckets are given."""
    hashing, (number, length, width) = setting.hashing, vectors.shape
    chunks = n_buckets(length, hashing.bucket_size)
    if arrays.buckets is not None:
        return arrays.buckets.reshape(number, hashing.rounds(chunks), length).astype(jnp.int32)
    if drop_key is not None and hashing.drop_for_hash_rate > 0:
        kept = jax.random.bernoulli(drop_key, 1 - hashing.drop_for_hash_rate, vectors.shape)
        vectors = jnp.where(kept, vectors / (1 - hashing.drop_for_hash_rate), 0)
    rotations = arrays.rotations
    if rotations is None:
        assert arrays.key is not None
        rotations = draw_rotations(
            arrays.key,
            width,
            chunks,
            n_rounds=hashing.n_hashes if hashing.rehash_each_round else 1,
            rows=number if hashing.random_rotations_per_head else 1,
        )
    return hash_vectors(
        vectors,
        rotations,
        n_hashes=hashing.n_hashes,
        rehash_each_round=hashing.rehash_each_round,
        precision=setting.precision,
    )


def _empty(qk: Array, value: Array, queries: int, rounds: int, return_weights: bool) -> LSHOutput:
    """Results of an empty batch or sequence: empty arrays of the right shape."""
    *batch, length, heads, _ = qk.shape
    out = jnp.zeros((*batch, queries, heads, value.shape[-1]), qk.dtype)
    weights = jnp.zeros((*batch, heads, queries, length), at_least_float32(qk.dtype))
    buckets = jnp.zeros((*batch, heads, rounds, length), jnp.int32)
    return LSHOutput(out, weights if return_weights else None, buckets)


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
