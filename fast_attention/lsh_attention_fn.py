"""Hashed attention with the signature of Flax's ``dot_product_attention``.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width, R rounds, J buckets of a round.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.axes import attended_axes, fold_axes, unfold_axes
from fast_attention.call_arguments import refuse
from fast_attention.lsh_attention import lsh_attention
from fast_attention.recipes import attention_factory
from fast_attention.shared_qk_attention import shared_qk_attention
from fast_attention.shared_query_key import LSHOutput

_ADVICE = {
    "bias": "use mask or key_mask, or exact attention with a bias",
    "module": "ask for them with return_weights=True",
    "input_positions": "pass positions=, with rotary=True",
    "segment_ids": "pass a mask of equal segments, or segments as elements of the batch",
}
"""What to do in place of an option that there is not."""


@dataclasses.dataclass(frozen=True)
class LSHAttention:
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

    def __call__(
        self,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B S H D"],
        value: Float[Array, "*B S K V"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = True,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        key_mask: Bool[Array, ...] | None = None,
        segment_ids: Int[Array, ...] | None = None,
        projection: Array | None = None,
        positions: Int[Array, "*B T"] | None = None,
        buckets: Int[Array, "*B H R S"] | None = None,
        return_weights: bool = False,
        return_buckets: bool = False,
    ) -> Float[Array, "*B T H V"] | LSHOutput:
        """Attends. A masked query gives zeros.

        Args:
          query: ``[*B, T, H, D]``, for its length; see the class.
          key: ``[*B, S, H, D]``, S >= T: the queries, then given keys.
          value: ``[*B, S, K, V]``; K divides H.
          bias: must be None.
          mask: bool or 0/1, broadcastable to ``[*B, H, T, S]``; True sees. One that is the same
            for all queries and heads is padding, as ``key_mask``; any other takes memory as the
            square of the length.
          broadcast_dropout: drop the weights of the same slots in all rows.
          dropout_rng: key of all dropout.
          dropout_rate: of attention weights.
          deterministic: no dropout, of weights or before hashing.
          dtype: to compute in, by default the promoted type of key and value. Softmax and sums are
            float32 at least.
          precision: of the products.
          module: must be None; see ``return_weights``.
          is_causal: as ``unidirectional``. Given keys are seen by all queries in either case.
          force_fp32_for_softmax: has no effect: the softmax is in float32 in either case.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None; see ``positions``.
          axis: attend over this axis, or over several at once, flattened in row-major order;
            other axes before the heads are batch. None is the last axis before the heads. With
            several axes, T and S in masks are the products of their lengths.
          key_mask: ``[*B, S]`` bool (the shape of key without heads and width); a position where
            it is False is not seen and sees nothing.
          segment_ids: must be None.
          projection: what :meth:`draw_projection` drew; or rotations ``[1 or B * H, D, R, J / 2]``
            float, R = 1 unless ``rehash_each_round``. Not read by exact attention.
          positions: ``[*B, T]`` for rotary positions, by default 0, 1, ..
          buckets: ``[*B, H, R, S]`` of an earlier call, to attend to the same again. Not read by
            exact attention.
          return_weights: also the weights.
          return_buckets: also the buckets.

        Returns:
          ``[*B, T, H, V]`` in ``dtype``; or an :class:`LSHOutput` if weights or buckets are asked
          for, whose buckets are None where attention was exact.

        Raises:
          ValueError: for shapes that do not fit, or an option that this attention does not have.
        """
        refuse(
            "Hashed attention",
            _ADVICE,
            bias=bias,
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
            segment_ids=segment_ids,
        )
        dtype = jnp.result_type(key, value, float) if dtype is None else dtype
        axes, unfolded = attended_axes(query.ndim, axis), query.shape
        query, key, value = (fold_axes(x, axes, trailing=2) for x in (query, key, value))
        key_mask = None if key_mask is None else fold_axes(key_mask, axes, trailing=0)
        positions = None if positions is None else fold_axes(positions, axes, trailing=0)
        _check_shapes(query, key, value)
        mask, key_mask = _padding_apart(mask, key_mask, key.shape[:-2])
        options: dict[str, Any] = {
            "causal": self.unidirectional or is_causal,
            "query_length": query.shape[-3],
            "key_mask": key_mask,
            "mask": mask,
            "rotary": self.rotary,
            "positions": positions,
            "scale": self.scale,
            "dropout_rate": 0.0 if deterministic else dropout_rate,
            "dropout_key": None if deterministic else dropout_rng,
            "broadcast_dropout": broadcast_dropout,
            "precision": precision,
            "return_weights": return_weights,
        }
        key, value = key.astype(dtype), value.astype(dtype)
        longest = self.bucket_size if self.full_attn_thres is None else self.full_attn_thres
        if self.use_full_attn or key.shape[-3] <= longest:
            found = shared_qk_attention(key, value, **options)
            if return_buckets and not isinstance(found, LSHOutput):
                found = LSHOutput(found, None, None)
        else:
            found = lsh_attention(
                key,
                value,
                **options,
                **({} if buckets is not None else self._directions(projection)),
                buckets=buckets,
                bucket_size=self.bucket_size,
                n_hashes=self.n_hashes,
                allow_duplicate_attention=self.allow_duplicate_attention,
                count_across_rounds=self.count_across_rounds,
                attend_across_buckets=self.attend_across_buckets,
                rehash_each_round=self.rehash_each_round,
                drop_for_hash_rate=0.0 if deterministic else self.drop_for_hash_rate,
                random_rotations_per_head=self.random_rotations_per_head,
                hash_masked=self.hash_masked,
                attn_chunks=self.attn_chunks,
                return_buckets=return_buckets,
            )
        if isinstance(found, LSHOutput):
            return found._replace(out=unfold_axes(found.out, axes, unfolded))
        return unfold_axes(found, axes, unfolded)

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
    """Makes Reformer's attention; see :func:`fast_attention.lsh_attention.lsh_attention`.

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
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if not (allow_duplicate_attention or rehash_each_round):
        raise ValueError(
            "allow_duplicate_attention=False needs rehash_each_round=True: with one rotation for "
            "all rounds, repetitions cannot be counted."
        )
    if not 0 <= drop_for_hash_rate < 1:
        raise ValueError(
            f"drop_for_hash_rate must be at least 0 and below 1, got {drop_for_hash_rate}."
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


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim >= 3 or query.shape[:-3] != key.shape[:-3]:
        raise ValueError(
            "Expected query [*batch, length, heads, width], key and value likewise with the same "
            f"batch, got {shapes}."
        )
    if query.shape[-2:] != key.shape[-2:] or query.shape[-3] > key.shape[-3]:
        raise ValueError(
            "Queries and keys are the same vectors, so key must have the heads and width of query, "
            f"and its length or more (given keys behind), got {shapes}. Build the layer with one "
            "projection for both."
        )


def _padding_apart(
    mask: Array | None, key_mask: Array | None, shape: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """Makes a mask that is the same for all queries and heads part of the key mask ``[*B, S]``."""
    if mask is None:
        return None, key_mask
    mask = jnp.asarray(mask)
    full = mask.reshape((1,) * (len(shape) + 2 - mask.ndim) + mask.shape)
    if full.shape[-2] > 1 or full.shape[-3] > 1:
        return mask, key_mask
    keys = jnp.broadcast_to(full[..., 0, 0, :].astype(bool), shape)
    return None, keys if key_mask is None else keys & key_mask.astype(bool)
