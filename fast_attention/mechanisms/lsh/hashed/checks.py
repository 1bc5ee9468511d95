"""Arguments of hashed attention that do not fit are refused, with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Mapping

from fast_attention.arrays.types import Array


def rounds_of(n_hashes: int, rehash_each_round: bool, n_buckets: int) -> int:
    """Rounds there are: with one rotation for all, no more than it has buckets."""
    return n_hashes if rehash_each_round else min(n_hashes, n_buckets)


def check_arguments(
    qk: Array,
    value: Array,
    *,
    rotations: Array | None,
    key: Array | None,
    buckets: Array | None,
    rounds: int,
    n_buckets: int,
    query_length: int | None,
    positions: Array | None,
    key_mask: Array | None,
    bucket_size: int,
    n_hashes: int,
    attn_chunks: int,
    rates: Mapping[str, float],
    dropout_key: Array | None,
    rotary: bool,
    discount_repeated: bool,
) -> None:
    """Checks what `lsh_attention` was given.

    Raises:
      ValueError: if anything does not fit.
    """
    shapes = f"qk {qk.shape}, value {value.shape}"
    if qk.ndim < 3 or qk.shape[:-2] != value.shape[:-2]:
        raise ValueError(
            f"Expected qk [*batch, length, heads, width] and value [*batch, length, value heads, "
            f"value width], with the same batch and length, got {shapes}."
        )
    length, heads = qk.shape[-3:-1]
    if value.shape[-2] == 0 or heads % value.shape[-2]:
        raise ValueError(f"The number of value heads must divide that of heads, got {shapes}.")
    if query_length is not None and not min(1, length) <= query_length <= length:
        raise ValueError(
            f"query_length={query_length} must be between 1 and the {length} positions of qk."
        )
    for name, number in (
        ("bucket_size", bucket_size),
        ("n_hashes", n_hashes),
        ("attn_chunks", attn_chunks),
    ):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if sum(x is not None for x in (rotations, key, buckets)) != 1:
        raise ValueError(
            "Pass exactly one of rotations=, key= (a random key they are drawn from) and buckets= "
            "(from an earlier call)."
        )
    if discount_repeated:
        raise ValueError(
            "allow_duplicate_attention=False needs rehash_each_round=True: with one rotation for "
            "all rounds, repetitions cannot be counted."
        )
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {rate}.")
        if rate > 0 and dropout_key is None:
            raise ValueError(f"{name}={rate} needs dropout_key, a JAX random key.")
    if positions is not None and not rotary:
        raise ValueError("positions are those of rotary=True: pass both, or neither.")
    half = n_buckets // 2
    if rotations is not None and rotations.shape[-1] != half:
        raise ValueError(
            f"{length} positions in chunks of {bucket_size} have {n_buckets} buckets, so the last "
            f"axis of rotations must be half of the buckets, {half}, got {rotations.shape}."
        )
    expected = (*qk.shape[:-3], heads, rounds, length)
    if buckets is not None and buckets.shape != expected:
        raise ValueError(
            f"buckets must have shape {expected}, [*batch, heads, rounds, length], got "
            f"{buckets.shape}."
        )
    queries = length if query_length is None else query_length
    for name, x, end in (("positions", positions, queries), ("key_mask", key_mask, length)):
        shape = (*qk.shape[:-3], end)
        if x is None:
            continue
        if x.ndim != len(shape) or any(
            n not in (1, m) for n, m in zip(x.shape, shape, strict=True)
        ):
            raise ValueError(f"{name} must have shape {shape}, got {x.shape}.")
