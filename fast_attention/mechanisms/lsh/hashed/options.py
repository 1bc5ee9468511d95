"""How positions are hashed, and what a query sees of what it meets."""

from __future__ import annotations

import dataclasses

from fast_attention.mechanisms.checks import check_choice, check_count, check_number, check_rate


@dataclasses.dataclass(frozen=True)
class Hashing:
    """The options of hashed attention; hashable.

    Attributes:
      bucket_size: C, the size of a chunk; on average that of a bucket too.
      n_hashes: R, rounds of hashing.
      allow_duplicate_attention: a pair counts in every round in which it meets; otherwise
        ``log(times it meets + 1e-9)`` is taken from its logits, so that it counts once.
      count_across_rounds: count meetings across the border of two rounds, too. The original does
        not: where a pair meets only there, its weight is multiplied by 1e9, and more rounds make
        such pairs more. False is for weights trained with it.
      attend_across_buckets: a query sees all of its two chunks, or only its own bucket there.
      rehash_each_round: a rotation for each round, or else the R best buckets of one.
      drop_for_hash_rate: dropout of the features that are hashed.
      random_rotations_per_head: draw rotations for every head of every element of the batch.
      hash_masked: masked positions stand where they hash to and see themselves alone, as in the
        original, so that what they hold shifts the borders of chunks; otherwise they stand behind
        all buckets and give 0.
      rotary: rotate pairs of neighbouring features by position, after hashing.
      scale: of the logits, by default ``D ** -0.5``. Reformer in trax had 1: the keys are of unit
        length already.
      attn_chunks: do the B * H rows in at least so many steps, one after another.
      implementation: "chunked", or None, has a gradient of its own; "reference" is left to JAX,
        which then has forward mode, too, and keeps all weights for reverse mode.
    """

    bucket_size: int = 64
    n_hashes: int = 8
    allow_duplicate_attention: bool = True
    count_across_rounds: bool = True
    attend_across_buckets: bool = True
    rehash_each_round: bool = True
    drop_for_hash_rate: float = 0.0
    random_rotations_per_head: bool = False
    hash_masked: bool = False
    rotary: bool = False
    scale: float | None = None
    attn_chunks: int = 1
    implementation: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for options that exclude each other or are out of range."""
        for name in ("bucket_size", "n_hashes", "attn_chunks"):
            check_count(name, getattr(self, name))
        check_rate("drop_for_hash_rate", self.drop_for_hash_rate)
        if self.scale is not None:
            check_number("scale", self.scale)
        known = ("chunked", "reference", None)
        check_choice("implementation of hashed attention", self.implementation, known)
        if not (self.allow_duplicate_attention or self.rehash_each_round):
            raise ValueError(
                "allow_duplicate_attention=False needs rehash_each_round=True: with one rotation "
                "for all rounds, repetitions cannot be counted."
            )

    def rounds(self, n_buckets: int) -> int:
        """Rounds there are: with one rotation for all, no more than it has buckets."""
        return self.n_hashes if self.rehash_each_round else min(self.n_hashes, n_buckets)
