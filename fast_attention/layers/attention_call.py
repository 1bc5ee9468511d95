"""Calls any function with the signature of ``nnx.dot_product_attention``.

What a function has a parameter for it is told by name; of the rest a mask is made.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head width,
V value width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.array_types import Array, Bool, Float, Int


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
    attention_fn: Callable[..., Any],
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
      **options: Passed on as they are.

    Returns:
      What the function returns, as a rule ``[B, T, H, V]``.
    """
    told = {
        "key_mask": visible.key_mask,
        "segment_ids": visible.segment_ids,
        "is_causal": visible.causal or None,
    }
    told = {name: value for name, value in told.items() if value is not None}
    names = parameter_names(attention_fn)
    length, key_length = query.shape[1], key.shape[1]
    if visible.mask is not None:
        rest = ((0, 0), (0, 0), (0, key_length - length))
        told["mask"] = jnp.pad(visible.mask, rest, constant_values=True)[:, None]
    if names is not None:
        mask: Any = told.pop("mask", True)
        if "key_mask" in told and "key_mask" not in names:
            mask &= told.pop("key_mask")[:, None, None, :]
        if "segment_ids" in told and "segment_ids" not in names:
            mask &= _same_run(told.pop("segment_ids"))
        if "is_causal" in told and "is_causal" not in names:
            told.pop("is_causal")
            seen = jnp.arange(key_length)[None] <= jnp.arange(length)[:, None]
            mask &= (seen | (jnp.arange(key_length)[None] >= length))[None, None]
        if mask is not True:
            told["mask"] = mask
        rotates = getattr(attention_fn, "rotary", True)
        if visible.query_mask is not None and "query_mask" in names:
            told["query_mask"] = visible.query_mask
        if visible.positions is not None and "positions" in names and rotates:
            told["positions"] = visible.positions
    return attention_fn(query, key, value, **told, **options)


def call_with_choice(
    attention_fn: Callable[..., Any],
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
      **options: Passed on.

    Returns:
      What `call_attention` returns and the buckets, None where there are none.
    """
    if "return_buckets" not in (parameter_names(attention_fn) or ()):
        return call_attention(attention_fn, query, key, value, visible, **options), None
    options |= {"buckets": choice, "return_buckets": True}
    found = call_attention(attention_fn, query, key, value, visible, **options)
    return found.out, found.buckets


def causal_by_mask(visible: Visible, length: int) -> Visible:
    """The same sight, for functions that differ in what causal means where keys stand behind."""
    past = jnp.tri(length, dtype=bool)[None]
    past = past if visible.mask is None else past & visible.mask
    return visible._replace(causal=False, mask=past)


def parameter_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the parameters of a function; None if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def _same_run(segment_ids: Array) -> Array:
    changed = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    runs = jnp.cumsum(changed, axis=1)
    return runs[:, None, :, None] == runs[:, None, None, :]
