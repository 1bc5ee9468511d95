"""Attention masks and biases: what functions of keys alone can use, and what others take.

Linear attention never forms the ``[T, S]`` matrix, so a mask must factor into a key mask and
causality, and a bias must be constant over queries.

A concrete mask that a function cannot honour raises. Inside a compiled program nothing can be
raised, so the check is part of the program: it returns which rows of the batch have a mask that is
honoured, and the outputs of the others are NaN.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.mechanisms.checks import as_visible, check_broadcast, mismatch
from fast_attention.mechanisms.mask_structure import common_keys

BIAS_ADVICE = "booleans and numbers 0 and 1 are a mask"
EXACT = "use exact attention (make_softmax_attention)"


class Sizes(NamedTuple):
    """The sizes of one call: ``*B``, T, S, H and K."""

    batch_shape: tuple[int, ...]
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int

    @property
    def full(self) -> tuple[int, ...]:
        """``[*B, H, T, S]``."""
        return (*self.batch_shape, self.num_heads, self.num_queries, self.num_keys)


def pair_mask(mask: Any, sizes: Sizes) -> tuple[Bool[Array, ...], Array | None]:
    """Checks a Flax mask for a function that takes any.

    Args:
      mask: bool or 0/1, broadcastable to ``[*B, H, T, S]``; true means "may see".
      sizes: of the call.

    Returns:
      bool with the rank of ``[*B, H, T, S]``, and for traced numbers the rows ``[*B]`` of the batch
      (axes may be 1) whose values are all 0 or 1, else None.
    """
    check_broadcast("mask", jnp.shape(mask), sizes.full)
    visible, values = as_visible("mask", mask)
    fits = None if values is None else _full_rank(values, sizes).all(axis=(-1, -2, -3))
    return jnp.asarray(_full_rank(visible, sizes)), fits


def pair_bias(bias: Any, sizes: Sizes) -> Array:
    """Checks a Flax bias for a function that takes any; returns the rank of ``[*B, H, T, S]``."""
    check_broadcast("bias", jnp.shape(bias), sizes.full)
    if not jnp.issubdtype(jnp.result_type(bias), jnp.floating):
        raise mismatch("bias", "of a floating type", f"dtype {jnp.result_type(bias)}", BIAS_ADVICE)
    return _full_rank(jnp.asarray(bias), sizes)


def key_mask_from_mask(
    mask: Any, sizes: Sizes, *, causal: bool
) -> tuple[Bool[Array, "*B S K"], Array | None]:
    """Turns a Flax mask into a mask of keys.

    Accepted are masks that are constant over queries (exact), and ``padding x padding`` masks, with
    or without a causal factor, of which the key part is taken. Causal attention hides later keys by
    itself, so what a mask says about them does not matter.

    Args:
      mask: bool or 0/1 numbers, broadcastable to ``[*B, H, T, S]``; true means "may see".
      sizes: of the call.
      causal: whether the attention is causal by itself.

    Returns:
      bool ``[*B, S, K]`` or ``[*B, S, 1]``, and for a traced mask that could be another one the
      rows ``[*B]`` of the batch (axes may be 1) that are accepted, else None.

    Raises:
      ValueError: for a shape that does not broadcast, values other than 0 and 1, a concrete mask
        that linear attention cannot honour, or one that differs among the query heads of a group.
    """
    check_broadcast("mask", jnp.shape(mask), sizes.full)
    visible, values = as_visible("mask", mask)
    traced = isinstance(visible, Tracer)
    visible = _full_rank(visible, sizes)
    conditions = [] if values is None else [_full_rank(values, sizes).all(axis=(-1, -2, -3))]
    if visible.shape[-2] == 1:
        keys = visible[..., 0, :]
    else:
        keys, expressible = common_keys(visible, causal=causal)
        expressible = expressible.all(axis=-1)
        if not traced and not expressible.all():
            raise ValueError(_explain(np.asarray(visible), causal))
        conditions.append(expressible)
    keys, alike = _per_kv_head(keys, sizes)
    if alike is not None:
        conditions.append(alike)
    keys = jnp.broadcast_to(jnp.asarray(keys), (*sizes.batch_shape, keys.shape[-2], sizes.num_keys))
    return jnp.swapaxes(keys, -1, -2), _all_of(conditions) if traced else None


def key_bias_from_bias(bias: Any, sizes: Sizes) -> Float[Array, "*B S K"]:
    """Turns a Flax bias that is constant over queries into a bias of keys.

    Args:
      bias: broadcastable to ``[*B, H, T, S]``.
      sizes: of the call.

    Returns:
      ``[*B, S, K]`` or ``[*B, S, 1]``.

    Raises:
      ValueError: for a shape that does not broadcast, or a bias that depends on the query.
    """
    pair_bias(bias, sizes)
    traced = isinstance(bias, Tracer)
    values: Any = _full_rank(bias if traced else np.asarray(bias), sizes)
    if values.shape[-2] != 1:
        if traced or not (values == values[..., :1, :]).all():
            raise mismatch(
                "bias",
                "the same for all queries",
                f"shape {jnp.shape(bias)}, which depends on the query",
                "give a query axis of length 1 (it is applied exactly), a causal structure by "
                "unidirectional=True or is_causal=True, padding by mask or key_mask, and positions "
                f"by rotating queries and keys; or {EXACT}",
            )
        values = values[..., :1, :]
    keys, alike = _per_kv_head(values[..., 0, :], sizes)
    if alike is not None:
        raise mismatch(
            "bias",
            "the same for all query heads that share a key head",
            f"a traced one of shape {jnp.shape(bias)}",
            "give it one head axis of length 1",
        )
    keys = jnp.broadcast_to(jnp.asarray(keys), (*sizes.batch_shape, keys.shape[-2], sizes.num_keys))
    return jnp.swapaxes(keys, -1, -2)


def same_run(segment_ids: Array) -> Array:
    """Returns ``[*B, 1, T, T]``, whether two positions lie in the same run of equal ids."""
    changed = segment_ids[..., 1:] != segment_ids[..., :-1]
    runs = jnp.cumsum(jnp.pad(changed, [(0, 0)] * (changed.ndim - 1) + [(1, 0)]), axis=-1)
    return (runs[..., :, None] == runs[..., None, :])[..., None, :, :]


def _full_rank(x: Any, sizes: Sizes) -> Any:
    return x.reshape((1,) * (len(sizes.full) - x.ndim) + x.shape)


def _all_of(conditions: list[Any]) -> Any:
    found = conditions[0] if conditions else None
    for condition in conditions[1:]:
        found = found & condition
    return found


def _explain(visible: np.ndarray, causal: bool) -> str:
    rows, columns = visible.shape[-2:]
    remedy = (
        "Linear attention supports only masks of keys (the same for all queries of a sequence) "
        "and causality. Pass padding as a key mask [*batch, 1, 1, keys] or key_mask, packed "
        f"sequences as segment_ids; for any other pattern {EXACT}."
    )
    if not causal and rows == columns and not np.triu(visible, 1).any():
        return (
            f"A mask of shape {visible.shape} with a causal pattern was given to bidirectional "
            "attention, which would see later tokens. Build the function with unidirectional=True "
            "or pass is_causal=True. " + remedy
        )
    return f"The mask of shape {visible.shape} is not supported. " + remedy


def _per_kv_head(keys: Any, sizes: Sizes) -> tuple[Any, Any]:
    """Brings ``[..., H or 1, S]`` to ``[..., K or 1, S]``; a traced one with whether it could."""
    heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
    if keys.shape[-2] == 1 or heads == kv_heads:
        return keys, None
    grouped = keys.reshape(*keys.shape[:-2], kv_heads, heads // kv_heads, keys.shape[-1])
    first = grouped[..., :1, :]
    alike = (grouped == first).all(axis=(-1, -2, -3))
    if isinstance(keys, Tracer):
        return first[..., 0, :], alike
    if not alike.all():
        raise ValueError(
            f"A mask or bias that differs by head must be the same for all {heads // kv_heads} "
            f"query heads that share a key head; give it with one head axis of length 1, or pass "
            f"key_mask with shape [*batch, keys, {kv_heads}]."
        )
    return first[..., 0, :], None
