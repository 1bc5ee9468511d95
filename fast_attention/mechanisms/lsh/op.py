"""Hashed attention of arrays, with options as keyword arguments.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width.
"""

from __future__ import annotations

from typing import Any

import jax

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.lsh.hashed import Hashing, hashed_attention
from fast_attention.mechanisms.lsh.operands import LSHOutput


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

    See :func:`fast_attention.mechanisms.lsh.hashed.hashed_attention` for what is computed.

    Args:
      qk: ``[*B, S, H, D]``, shared queries and keys: the first T positions are queries, all are
        keys.
      value: ``[*B, S, K, V]``; K divides H.
      key: a typed random key, or directions to hash with, or the buckets of an earlier call.
      causal: a query sees positions up to its own, and all given keys.
      query_length: T, by default S. Positions from T on are given keys.
      key_mask: ``[*B, S]``, False is padding.
      mask: broadcastable to ``[*B, H, T, S]``, True sees.
      positions: ``[*B, T]`` of the queries for ``rotary``.
      dropout: of the weights.
      precision: of the products.
      return_weights: return an :class:`LSHOutput` with the weights.
      return_buckets: return an :class:`LSHOutput` with the buckets.
      **options: fields of :class:`Hashing`, such as ``bucket_size=64, n_hashes=8``.

    Returns:
      ``[*B, T, H, V]``, or an :class:`LSHOutput`.

    Raises:
      TypeError: for an option that :class:`Hashing` does not have.
      ValueError: for shapes that do not fit.
    """
    found = hashed_attention(
        qk,
        value,
        key,
        Hashing(**options),
        causal=causal,
        query_length=query_length,
        key_mask=key_mask,
        mask=mask,
        positions=positions,
        dropout=dropout,
        precision=precision,
        return_weights=return_weights,
    )
    return found if return_weights or return_buckets else found.out
