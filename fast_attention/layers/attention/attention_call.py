"""Calls attention functions with what a layer knows of its positions.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head width,
V value width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.checks import mismatch


class Visible(NamedTuple):
    """Which keys a query sees.

    Attributes:
      causal: Position t sees keys 0..t, and those behind the first T.
      key_mask: ``[B, S]``, False is never seen.
      segment_ids: ``[B, T]``, positions see their own run of equal ids.
      positions: ``[B, T]``, for functions that rotate by themselves.
      mask: ``[B, T, T]``, what each of the first T keys is seen by.
      query_mask: ``[B, T]``, False is padding, for functions that look at the queries together.
    """

    causal: bool = False
    key_mask: Bool[Array, "B S"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    positions: Int[Array, "B T"] | None = None
    mask: Bool[Array, "B T T"] | None = None
    query_mask: Bool[Array, "B T"] | None = None


def call_attention(
    attention_fn: AttentionFn,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K V"],
    visible: Visible,
    **options: Any,
) -> Any:
    """Attends.

    Args:
      attention_fn: The function.
      query: ``[B, T, H, D]``.
      key: ``[B, S, K, D]``.
      value: ``[B, S, K, V]``.
      visible: Which keys are seen.
      **options: Other arguments of the function.

    Returns:
      What the function returns, as a rule ``[B, T, H, V]``.
    """
    mask = visible.mask
    if mask is not None:
        if mask.ndim != 3:
            raise mismatch(
                "mask", "[B, T, T]", f"shape {mask.shape}", "padding [B, T] is passed as key_mask"
            )
        rest = ((0, 0), (0, 0), (0, key.shape[1] - query.shape[1]))
        mask = jnp.pad(mask, rest, constant_values=True)[:, None]
    return attention_fn(
        query,
        key,
        value,
        mask=mask,
        is_causal=visible.causal,
        key_mask=visible.key_mask,
        segment_ids=visible.segment_ids,
        query_mask=visible.query_mask,
        positions=visible.positions if attention_fn.takes.positions else None,
        **options,
    )


def call_with_choice(
    attention_fn: AttentionFn,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K V"],
    visible: Visible,
    choice: Any,
    **options: Any,
) -> tuple[Float[Array, "B T H V"], Any]:
    """Attends; hash buckets, where the function has them, are returned too.

    Args:
      attention_fn: As for `call_attention`.
      query: As there.
      key: As there.
      value: As there.
      visible: As there.
      choice: Buckets to be used again, of an earlier call; None hashes.
      **options: As there.

    Returns:
      What `call_attention` returns and the buckets, None where there are none.
    """
    if not attention_fn.takes.buckets:
        return call_attention(attention_fn, query, key, value, visible, **options), None
    options |= {"buckets": choice, "return_buckets": True}
    found = call_attention(attention_fn, query, key, value, visible, **options)
    return found.out, found.buckets


def causal_by_mask(visible: Visible, length: int) -> Visible:
    """The same sight, for functions that differ in what causal means where keys stand behind."""
    past = jnp.tri(length, dtype=bool)[None]
    past = past if visible.mask is None else past & visible.mask
    return visible._replace(causal=False, mask=past)
