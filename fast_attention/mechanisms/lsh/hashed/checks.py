"""Arguments of hashed attention that do not fit are refused, with the reason and the remedy."""

from __future__ import annotations

from fast_attention.arrays.types import Array
from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.lsh.hashed.options import Hashing


def check_arguments(
    qk: Array,
    value: Array,
    hashing: Hashing,
    *,
    rotations: Array | None,
    buckets: Array | None,
    n_buckets: int,
    query_length: int | None,
    positions: Array | None,
    key_mask: Array | None,
    dropout: Dropout | None,
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
    if hashing.drop_for_hash_rate > 0 and dropout is None:
        raise ValueError(
            f"drop_for_hash_rate={hashing.drop_for_hash_rate} needs dropout, with a random key."
        )
    if positions is not None and not hashing.rotary:
        raise ValueError("positions need rotary=True: pass both, or neither.")
    half = n_buckets // 2
    if rotations is not None and rotations.shape[-1] != half:
        raise ValueError(
            f"{length} positions in chunks of {hashing.bucket_size} have {n_buckets} buckets, so "
            f"the last axis of rotations must be half of the buckets, {half}, got "
            f"{rotations.shape}."
        )
    expected = (*qk.shape[:-3], heads, hashing.rounds(n_buckets), length)
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
