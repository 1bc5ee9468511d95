"""Hashed attention with the signature of Flax's ``dot_product_attention``.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width, R rounds, J buckets of a round.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import is_random_key
from fast_attention.arrays.types import Array, Float
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Dropout, Takes
from fast_attention.mechanisms.checks import check_count, check_seed
from fast_attention.mechanisms.lsh.exact import shared_qk_attention
from fast_attention.mechanisms.lsh.hashed import Hashing, lsh_attention
from fast_attention.mechanisms.lsh.operands import LSHOutput
from fast_attention.mechanisms.masks import same_run
from fast_attention.recipes import attention_factory


@dataclasses.dataclass(frozen=True, eq=False)
class LSHAttention(AttentionFn):
    """Reformer's attention as an ``attention_fn``, from :func:`make_lsh_attention`.

    Queries and keys are the same vectors: a layer has one projection for both, and passes its
    result as ``query`` and as ``key``; the keys of memory or context may be appended to ``key``.
    Only ``key`` is read, and its first T positions are the queries; it is not checked that
    ``query`` is the same. There is no decoding state (``init_state``): the chunk of a token
    depends on all others, so generation recomputes the whole prefix.

    Attributes:
      hashing: how positions are hashed.
      unidirectional: causal by construction.
      full_attn_thres: maximum length (including given keys) with exact attention; None is the size
        of a bucket.
      use_full_attn: always use exact attention.
      seed: random seed of the rotations, for calls without them.
    """

    hashing: Hashing = Hashing()
    unidirectional: bool = False
    full_attn_thres: int | None = None
    use_full_attn: bool = False
    seed: int = 0

    mechanism = "Hashed attention"
    forward_mode = "make it with implementation='reference', which supports it"

    @property
    def takes(self) -> Takes:
        """Any mask, no bias; positions if it rotates."""
        return Takes(
            mask="pairs",
            bias=None,
            dropout="weights",
            projection=True,
            positions=self.hashing.rotary,
            buckets=True,
            shared_qk=True,
        )

    def attend(self, call: Call) -> Float[Array, "*B T H V"] | LSHOutput:
        """Attends; a masked query gives zeros.

        `buckets` ``[*B, H, R, S]`` of an earlier call are used again; they are None in the result
        of exact attention. With segments, or with a mask that differs between queries or heads,
        memory is quadratic in the length.
        """
        query, key, value = call.query, call.key, call.value
        mask, key_mask = call.pairs()
        if call.segment_ids is not None:
            given = key.shape[-3] - query.shape[-3]
            own = same_run(call.segment_ids)
            own = jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, given)], constant_values=True)
            mask = own if mask is None else own & mask
        options: dict[str, Any] = {
            "causal": call.causal or call.steps,
            "query_length": query.shape[-3],
            "key_mask": key_mask,
            "mask": mask,
            "positions": call.positions,
            "dropout": call.dropout,
            "precision": call.precision,
            "return_weights": call.return_weights,
        }
        hashing, longest = self.hashing, self.full_attn_thres
        longest = hashing.bucket_size if longest is None else longest
        if self.use_full_attn or key.shape[-3] <= longest:
            own = {"rotary": hashing.rotary, "scale": hashing.scale}
            found = shared_qk_attention(key, value, **options, **own)
            if call.return_buckets and not isinstance(found, LSHOutput):
                found = LSHOutput(found, None, None)
            return found
        if call.deterministic:
            hashing = dataclasses.replace(hashing, drop_for_hash_rate=0.0)
        elif call.training_key is not None and call.dropout is None:
            # Features may be dropped before hashing, without dropout of weights.
            options["dropout"] = Dropout(call.training_key, 0.0, True)
        where = self._directions(call.projection) if call.buckets is None else call.buckets
        options |= {"return_buckets": call.return_buckets} | dataclasses.asdict(hashing)
        return lsh_attention(key, value, where, **options)

    def exact(self) -> AttentionFn:
        """Exact attention with shared queries and keys."""
        return dataclasses.replace(self, use_full_attn=True)

    def draw_projection(self, key: Array, head_dim: int) -> Array:
        """Returns a random key's data, uint32, from which a call of any length draws rotations.

        The bits of the key are used directly: do not use the same key for anything else.
        """
        del head_dim
        return jax.random.key_data(key) if is_random_key(key) else key

    def _directions(self, projection: Array | None) -> Array:
        if projection is None:
            return jax.random.key(self.seed)
        if jnp.issubdtype(projection.dtype, jnp.floating):
            return projection
        return jax.random.wrap_key_data(projection)


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
    implementation: str | None = None,
) -> LSHAttention:
    """Makes Reformer's attention; see :func:`fast_attention.lsh_attention`.

    Args:
      bucket_size: size of a chunk, on average that of a bucket.
      n_hashes: R, rounds of hashing.
      unidirectional: always causal.
      allow_duplicate_attention: a pair counts in every round in which it shares a chunk.
      attend_across_buckets: a query sees all of its chunk and the previous one, whatever the
        bucket.
      rehash_each_round: a rotation for each round; if False, the R best buckets of one rotation.
      drop_for_hash_rate: dropout of the features that are hashed, unless deterministic.
      random_rotations_per_head: rotations for every head of every element of the batch.
      full_attn_thres: up to this length, given keys included, attention is exact; by default up to
        ``bucket_size``.
      use_full_attn: always exact.
      attn_chunks: process the B * H rows in at least this number of steps.
      rotary: rotate pairs of neighbouring features by position, after hashing (the layer must not
        do it).
      seed: random seed of the rotations, for calls without ``projection``.
      hash_masked: masked positions are sorted by their hash, as in the original; if False, they
        come after all others and their values have no effect.
      scale: of the logits, by default ``D ** -0.5``; 1 is that of Reformer in trax.
      count_across_rounds: without ``allow_duplicate_attention``, also count pairs that share chunks
        across the border of two rounds. False reproduces reformer-pytorch, where such pairs have
        1e9 times the correct weight.
      implementation: None, or "reference" for forward mode (``jax.jvp``), without the custom
        gradient that saves memory in reverse mode.

    Returns:
      An ``attention_fn`` for layers with shared queries and keys.

    Raises:
      ValueError: for options that exclude each other or are out of range.
    """
    if full_attn_thres is not None:
        check_count("full_attn_thres", full_attn_thres, least=0)
    hashing = Hashing(
        bucket_size=bucket_size,
        n_hashes=n_hashes,
        allow_duplicate_attention=allow_duplicate_attention,
        count_across_rounds=count_across_rounds,
        attend_across_buckets=attend_across_buckets,
        rehash_each_round=rehash_each_round,
        drop_for_hash_rate=drop_for_hash_rate,
        random_rotations_per_head=random_rotations_per_head,
        hash_masked=hash_masked,
        rotary=rotary,
        scale=scale,
        attn_chunks=attn_chunks,
        implementation=implementation,
    )
    return LSHAttention(hashing, unidirectional, full_attn_thres, use_full_attn, check_seed(seed))
