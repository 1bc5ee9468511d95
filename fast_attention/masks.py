"""Attention masks and biases as linear attention can use them; anything else is an error.

Linear attention never forms the ``[T, S]`` matrix, so a mask must factor into a key mask and
causality, and a bias must be constant over queries.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fast_attention.array_types import Array, Bool, Float


def key_mask_from_mask(
    mask: Array | np.ndarray,
    *,
    batch_shape: tuple[int, ...],
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
    causal: bool,
    check_traced: bool = False,
) -> Bool[Array, "*B S K"]:
    """Turns a Flax mask into a mask of keys.

    Accepted are masks that are constant over queries (exact), and ``padding x padding`` masks, with
    or without a causal factor, of which the key part is taken: a key is visible if any query may
    see it. A concrete mask outside this family raises; a traced one is trusted.

    Args:
      mask: bool or 0/1 numbers, broadcastable to ``[*B, H, T, S]``; true means "may see".
      batch_shape: ``*B``.
      num_queries: T.
      num_keys: S.
      num_heads: H.
      num_kv_heads: K.
      causal: whether the attention is causal by itself.
      check_traced: also check traced masks, when the program runs.

    Returns:
      bool ``[*B, S, K]`` or ``[*B, S, 1]``.

    Raises:
      ValueError: for a shape that does not broadcast, values other than 0 and 1, a concrete mask
        that linear attention cannot honour, or one that differs among the query heads of a group.
    """
    full = (*batch_shape, num_heads, num_queries, num_keys)
    _check_broadcast("mask", mask.shape, full)
    traced = isinstance(mask, Tracer)
    # A concrete mask is looked at with numpy: jax would stage even its operations inside jit.
    xp = jnp if traced else np
    visible = xp.asarray(mask)
    if not traced and visible.dtype != bool and not np.isin(visible, (0, 1)).all():
        raise ValueError(
            "mask must hold booleans or the numbers 0 and 1 (1 = may see), got other values; an "
            "additive mask goes into bias."
        )
    visible = visible.astype(bool)
    visible = visible.reshape((1,) * (len(full) - visible.ndim) + visible.shape)
    if visible.shape[-2] == 1:
        keys = visible[..., 0, :]
    else:
        keys = visible.any(axis=-2)
        expressible = _expressible(xp, visible, keys, causal)
        if not traced and not expressible:
            raise ValueError(_explain(np.asarray(visible), causal))
        if traced and check_traced:
            jax.debug.callback(_raise_unless, expressible)
    keys = _per_kv_head(keys, num_heads, num_kv_heads, traced)
    keys = jnp.broadcast_to(jnp.asarray(keys), (*batch_shape, keys.shape[-2], num_keys))
    return jnp.swapaxes(keys, -1, -2)


def key_bias_from_bias(
    bias: Array | np.ndarray,
    *,
    batch_shape: tuple[int, ...],
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
) -> Float[Array, "*B S K"]:
    """Turns a Flax bias that is constant over queries into a bias of keys.

    Args:
      bias: broadcastable to ``[*B, H, T, S]``.
      batch_shape: ``*B``.
      num_queries: T.
      num_keys: S.
      num_heads: H.
      num_kv_heads: K.

    Returns:
      ``[*B, S, K]`` or ``[*B, S, 1]``.

    Raises:
      ValueError: for a shape that does not broadcast, or a bias that depends on the query.
    """
    full = (*batch_shape, num_heads, num_queries, num_keys)
    _check_broadcast("bias", bias.shape, full)
    traced = isinstance(bias, Tracer)
    values = bias if traced else np.asarray(bias)
    values = values.reshape((1,) * (len(full) - values.ndim) + values.shape)
    if values.shape[-2] != 1:
        if traced or not (values == values[..., :1, :]).all():
            raise ValueError(
                f"bias of shape {bias.shape} depends on the query: linear attention has no "
                "query-by-key matrix to add it to. Give a bias with a query axis of length 1 (it "
                "is applied exactly), a causal structure by unidirectional=True or is_causal=True, "
                "padding by mask or key_mask, and positions by rotating queries and keys; or use "
                "exact attention (make_softmax_attention)."
            )
        values = values[..., :1, :]
    keys = _per_kv_head(values[..., 0, :], num_heads, num_kv_heads, traced)
    keys = jnp.broadcast_to(jnp.asarray(keys), (*batch_shape, keys.shape[-2], num_keys))
    return jnp.swapaxes(keys, -1, -2)


def _check_broadcast(name: str, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    if len(shape) > len(full) or any(
        given not in (1, wanted) for given, wanted in zip(padded, full, strict=True)
    ):
        raise ValueError(
            f"{name} must be broadcastable to [*batch, heads, queries, keys] = {full}, got shape "
            f"{tuple(shape)}."
        )


def _expressible(xp: Any, visible: Any, keys: Any, causal: bool) -> Any:
    """Whether rows, where not entirely masked, show the key mask (times causality)."""
    rows, columns = visible.shape[-2:]
    expected = xp.broadcast_to(keys[..., None, :], visible.shape)
    unused = ~visible.any(axis=-1, keepdims=True)
    fits = (unused | (visible == expected)).all()
    if causal and rows == columns:
        lower = np.tri(rows, dtype=bool).reshape((1,) * (visible.ndim - 2) + (rows, rows))
        fits = fits | (unused | (visible == (expected & lower))).all()
    return fits


def _explain(visible: np.ndarray, causal: bool) -> str:
    rows, columns = visible.shape[-2:]
    remedy = (
        "Linear attention sees a mask as which keys count (the same for all queries of a sequence) "
        "and causality. Pass padding as a key mask [*batch, 1, 1, keys] or key_mask, packed "
        "sequences as segment_ids; for any other pattern use exact attention "
        "(make_softmax_attention)."
    )
    if not causal and rows == columns and not np.triu(visible, 1).any():
        return (
            f"A mask of shape {visible.shape} with a causal pattern was given to bidirectional "
            "attention, which would see the future. Build the function with unidirectional=True "
            "or pass is_causal=True. " + remedy
        )
    return f"The mask of shape {visible.shape} cannot be honoured. " + remedy


def _raise_unless(expressible: Array) -> None:
    if not bool(expressible):
        raise ValueError(
            "A mask given under jit is neither constant over queries nor padding x padding (x "
            "causal); linear attention took its key part only."
        )


def _per_kv_head(keys: Any, heads: int, kv_heads: int, traced: bool) -> Any:
    """Brings ``[..., H or 1, S]`` to ``[..., K or 1, S]``."""
    if keys.shape[-2] == 1 or heads == kv_heads:
        return keys
    grouped = keys.reshape(*keys.shape[:-2], kv_heads, heads // kv_heads, keys.shape[-1])
    if traced or not (grouped == grouped[..., :1, :]).all():
        raise ValueError(
            f"A mask or bias that differs by head must be the same for all {heads // kv_heads} "
            f"query heads that share a key head; give it with one head axis of length 1, or pass "
            f"key_mask with shape [*batch, keys, {kv_heads}]."
        )
    return grouped[..., 0, :]
