"""Hashed attention with the signature of Flax's ``dot_product_attention``.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width, R rounds, J buckets of a round.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.checks import check_count, check_number, check_rate, check_seed
from fast_attention.mechanisms.lsh.hashed import lsh_attention
from fast_attention.mechanisms.lsh.shared_qk import shared_qk_attention
from fast_attention.mechanisms.lsh.shared_query_key import LSHOutput
from fast_attention.mechanisms.masks import same_run
from fast_attention.recipes import attention_factory


@dataclasses.dataclass(frozen=True, eq=False)
class LSHAttention(AttentionFn):
    """Reformer's attention as an ``attention_fn``, from :func:`make_lsh_attention`.

    Queries and keys are the same vectors: a layer has one projection for both and passes its result
    as ``query`` and as ``key``, or as ``key`` with the keys of memory or context appended. Only
    ``key`` is read, and its first T positions are the queries; that ``query`` holds the same
    numbers is not checked. There is no state to decode with (``init_state``): what a token
    attends to depends on how all others fall into chunks, so generation computes the whole again.

    Attributes:
      bucket_size: as for :func:`make_lsh_attention`, like all that follow.
      n_hashes: rounds.
      unidirectional: causal by construction.
      allow_duplicate_attention: pairs count as often as they meet.
      count_across_rounds: count meetings across the border of two rounds.
      attend_across_buckets: a query sees all of its two chunks.
      rehash_each_round: a rotation for each round.
      drop_for_hash_rate: dropout before hashing.
      random_rotations_per_head: rotations for each row.
      full_attn_thres: longest input, given keys included, that is attended exactly.
      use_full_attn: attend exactly always.
      attn_chunks: steps over rows.
      rotary: rotate after hashing.
      hash_masked: masked positions stand where they hash to.
      scale: of the logits.
      seed: of the rotations, where a call gives none.
    """

    bucket_size: int = 64
    n_hashes: int = 8
    unidirectional: bool = False
    allow_duplicate_attention: bool = True
    count_across_rounds: bool = True
    attend_across_buckets: bool = True
    rehash_each_round: bool = True
    drop_for_hash_rate: float = 0.0
    random_rotations_per_head: bool = False
    full_attn_thres: int | None = None
    use_full_attn: bool = False
    attn_chunks: int = 1
    rotary: bool = False
    hash_masked: bool = False
    scale: float | None = None
    seed: int = 0

    mechanism = "Hashed attention"
    forward_mode = "use reverse mode (jax.grad, jax.vjp, jax.jacrev)"

    @property
    def takes(self) -> Takes:
        """Any mask, no bias; positions if it rotates."""
        return Takes(
            mask="pairs",
            bias=None,
            dropout="weights",
            projection=True,
            positions=self.rotary,
            buckets=True,
            shared_qk=True,
        )

    def attend(self, call: Call) -> Float[Array, "*B T H V"] | LSHOutput:
        """Attends; a masked query gives zeros.

        The buckets ``[*B, H, R, S]`` of an earlier call are attended to again, and are None in the
        result where attention was exact. A mask that differs between queries or heads, and
        segments, take memory as the square of the length.
        """
        query, key, value = call.query, call.key, call.value
        mask, key_mask = call.pairs()
        if call.segment_ids is not None:
            given = key.shape[-3] - query.shape[-3]
            own = same_run(call.segment_ids)
            own = jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, given)], constant_values=True)
            mask = own if mask is None else own & mask
        dropout_key, rate, broadcast = call.dropout or (None, 0.0, True)
        options: dict[str, Any] = {
            "causal": call.causal or call.steps,
            "query_length": query.shape[-3],
            "key_mask": key_mask,
            "mask": mask,
            "rotary": self.rotary,
            "positions": call.positions,
            "scale": self.scale,
            "dropout_rate": rate,
            "dropout_key": dropout_key,
            "broadcast_dropout": broadcast,
            "precision": call.precision,
            "return_weights": call.return_weights,
        }
        longest = self.bucket_size if self.full_attn_thres is None else self.full_attn_thres
        if self.use_full_attn or key.shape[-3] <= longest:
            found = shared_qk_attention(key, value, **options)
            if call.return_buckets and not isinstance(found, LSHOutput):
                found = LSHOutput(found, None, None)
            return found
        options["dropout_key"] = call.training_key
        return lsh_attention(
            key,
            value,
            **options,
            **({} if call.buckets is not None else self._directions(call.projection)),
            buckets=call.buckets,
            bucket_size=self.bucket_size,
            n_hashes=self.n_hashes,
            allow_duplicate_attention=self.allow_duplicate_attention,
            count_across_rounds=self.count_across_rounds,
            attend_across_buckets=self.attend_across_buckets,
            rehash_each_round=self.rehash_each_round,
            drop_for_hash_rate=0.0 if call.deterministic else self.drop_for_hash_rate,
            random_rotations_per_head=self.random_rotations_per_head,
            hash_masked=self.hash_masked,
            attn_chunks=self.attn_chunks,
            return_buckets=call.return_buckets,
        )

    def exact(self) -> AttentionFn:
        """Attention with shared queries and keys that does not hash."""
        return dataclasses.replace(self, use_full_attn=True)

    def draw_projection(self, key: Array, head_dim: int) -> Array:
        """Returns a random key's data, uint32, from which a call of any length draws rotations.

        The key's own bits are used as they are: pass one that serves nothing else.
        """
        del head_dim
        return jax.random.key_data(key) if _is_typed(key) else key

    def _directions(self, projection: Array | None) -> dict[str, Array]:
        if projection is None:
            return {"key": jax.random.key(self.seed)}
        if jnp.issubdtype(projection.dtype, jnp.floating):
            return {"rotations": projection}
        return {"key": jax.random.wrap_key_data(projection)}


@attention_factory
def make_lsh_attention(
    bucket_size: int = 64,
    n_hashes: int = 8,
    unidirectional: bool = False,
    allow_duplicate_attention: bool = True,
    attend_across_buckets: bool = True,
    rehash_each_round: bool = True,
    drop_for_hash_rate: float = 0.0,
    random_rotations_per_head: bool = False,
    full_attn_thres: int | None = None,
    use_full_attn: bool = False,
    attn_chunks: int = 1,
    rotary: bool = False,
    seed: int = 0,
    *,
    hash_masked: bool = False,
    scale: float | None = None,
    count_across_rounds: bool = True,
) -> LSHAttention:
    """Makes Reformer's attention; see :func:`fast_attention.lsh_attention`.

    Args:
      bucket_size: size of a chunk, on average that of a bucket.
      n_hashes: R, rounds of hashing.
      unidirectional: always causal.
      allow_duplicate_attention: a pair counts in every round in which it meets.
      attend_across_buckets: a query sees all of its chunk and the one before, whatever the bucket.
      rehash_each_round: a rotation for each round, or else the R best buckets of one.
      drop_for_hash_rate: dropout of the features that are hashed, unless deterministic.
      random_rotations_per_head: rotations for every head of every element of the batch.
      full_attn_thres: up to this length, given keys included, attention is exact; by default up to
        ``bucket_size``.
      use_full_attn: always exact.
      attn_chunks: do the B * H rows in at least so many steps.
      rotary: rotate pairs of neighbouring features by position, after hashing; so a layer must not.
      seed: of the rotations, for calls without ``projection``.
      hash_masked: masked positions stand where they hash to, as in the original; otherwise behind
        all others, where what they hold changes nothing.
      scale: of the logits, by default ``D ** -0.5``; 1 is that of Reformer in trax.
      count_across_rounds: without ``allow_duplicate_attention``, count meetings across the border
        of two rounds, too. False gives the numbers of reformer-pytorch, where a pair that meets
        only there weighs 1e9 times as much as it should.

    Returns:
      An ``attention_fn`` for layers with shared queries and keys.

    Raises:
      ValueError: for options that exclude each other or are out of range.
    """
    for name, number in (
        ("bucket_size", bucket_size),
        ("n_hashes", n_hashes),
        ("attn_chunks", attn_chunks),
    ):
        check_count(name, number)
    if full_attn_thres is not None:
        check_count("full_attn_thres", full_attn_thres, least=0)
    check_rate("drop_for_hash_rate", drop_for_hash_rate)
    check_seed(seed)
    if scale is not None:
        check_number("scale", scale)
    if not (allow_duplicate_attention or rehash_each_round):
        raise ValueError(
            "allow_duplicate_attention=False needs rehash_each_round=True: with one rotation for "
            "all rounds, repetitions cannot be counted."
        )
    return LSHAttention(
        bucket_size=bucket_size,
        n_hashes=n_hashes,
        unidirectional=unidirectional,
        allow_duplicate_attention=allow_duplicate_attention,
        count_across_rounds=count_across_rounds,
        attend_across_buckets=attend_across_buckets,
        rehash_each_round=rehash_each_round,
        drop_for_hash_rate=drop_for_hash_rate,
        random_rotations_per_head=random_rotations_per_head,
        full_attn_thres=full_attn_thres,
        use_full_attn=use_full_attn,
        attn_chunks=attn_chunks,
        rotary=rotary,
        hash_masked=hash_masked,
        scale=scale,
        seed=seed,
    )


def _is_typed(key: Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
