"""What Flax passes to an attention function, checked and brought to what linear attention takes.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array
from fast_attention.axes import attended_axes, fold_axes, unfold_axes
from fast_attention.dtypes import at_least_float32
from fast_attention.masks import key_bias_from_bias, key_mask_from_mask


class CallArguments(NamedTuple):
    """The arguments of one call, attended axes folded into one.

    Attributes:
      query: ``[*B, T, H, D]`` in the type of the computation.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``, keys dropped already.
      key_mask: bool ``[*B, S, K or 1]`` or None.
      key_bias: ``[*B, S, K or 1]`` or None.
      segment_ids: ``[*B, T]`` or None.
      causal: position t sees keys 0..t.
      axes: the axes that were folded, or None.
      shape: of the query before.
    """

    query: Array
    key: Array
    value: Array
    key_mask: Array | None
    key_bias: Array | None
    segment_ids: Array | None
    causal: bool
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]

    def unfold(self, out: Array) -> Array:
        """Puts the attended axes of an output back where they were."""
        return unfold_axes(out, self.axes, self.shape)


def prepare_call(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None,
    mask: Array | None,
    broadcast_dropout: bool,
    dropout_rng: Array | None,
    dropout_rate: float,
    dtype: Any,
    causal: bool,
    axis: int | tuple[int, ...] | None,
    key_mask: Array | None,
    segment_ids: Array | None,
    check_masks: bool = False,
) -> CallArguments:
    """Checks and folds the arguments of a call; see ``FastAttention.__call__`` for their meaning.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      bias: constant over queries, or it raises.
      mask: a key mask, or padding x padding, or it raises.
      broadcast_dropout: drop the same keys for all of batch and heads.
      dropout_rng: random key of dropout.
      dropout_rate: 0 where the call is deterministic.
      dtype: of the computation, None promotes.
      causal: whether it was asked for; one query over several keys (a cache) is left to the mask.
      axis: attended axis or axes.
      key_mask: ``[*B, S]`` or ``[*B, S, K]`` before folding.
      segment_ids: ``[*B, T]`` before folding.
      check_masks: check masks given under jit when the program runs.

    Raises:
      ValueError: for anything that cannot be honoured.
    """
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            "query, key and value must all be [*batch, length, heads, width] with the same number "
            f"of axes, got {query.shape}, {key.shape} and {value.shape}."
        )
    query, key, value = promote(query, key, value, dtype)
    axes = attended_axes(query.ndim, axis)
    shape = query.shape
    query, key, value = (fold_axes(x, axes, trailing=2) for x in (query, key, value))
    if key_mask is not None:
        per_head = int(key_mask.ndim == len(shape) - 1)
        key_mask = fold_axes(key_mask, axes, trailing=per_head)
        key_mask = key_mask if per_head else key_mask[..., None]
    if segment_ids is not None:
        segment_ids = fold_axes(segment_ids, axes, trailing=0)
    check_heads(query, key, value)
    causal = causal and not query.shape[-3] == 1 < key.shape[-3]
    sizes: dict[str, Any] = {
        "batch_shape": query.shape[:-3],
        "num_queries": query.shape[-3],
        "num_keys": key.shape[-3],
        "num_heads": query.shape[-2],
        "num_kv_heads": key.shape[-2],
    }
    masks = [] if key_mask is None else [key_mask.astype(bool)]
    if mask is not None:
        masks.append(key_mask_from_mask(mask, **sizes, causal=causal, check_traced=check_masks))
    if dropout_rate > 0:
        value = drop_keys(value, dropout_rng, dropout_rate, broadcast_dropout)
    return CallArguments(
        query,
        key,
        value,
        functools.reduce(jnp.logical_and, masks) if masks else None,
        None if bias is None else key_bias_from_bias(bias, **sizes),
        segment_ids,
        causal,
        axes,
        shape,
    )


def check_heads(query: Array, key: Array, value: Array) -> None:
    """Raises ValueError unless heads fit together."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads % kv_heads or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "Length comes before heads, [*batch, length, heads, width], and the number of query "
            f"heads is a multiple of that of key heads; got query {query.shape}, key {key.shape}, "
            f"value {value.shape}. Are length and heads swapped?"
        )


def refuse(mechanism: str, advice: Mapping[str, str], **options: Any) -> None:
    """Raises if an option is given that a mechanism does not have.

    Args:
      mechanism: its name, for the message.
      advice: what to do instead, by the name of the option.
      **options: what must be None.

    Raises:
      ValueError: at the first that is not None.
    """
    for name, value in options.items():
        if value is not None:
            instead = f" ({advice[name]})." if name in advice else "."
            raise ValueError(f"{mechanism} does not take {name}: leave it out{instead}")


def refuse_unsupported(
    module: Any,
    qk_attn_weights_einsum: Any,
    attn_weights_value_einsum: Any,
    input_positions: Any,
) -> None:
    """Raises ValueError for what Flax may ask of attention with a weight matrix."""
    if module is not None:
        raise ValueError(
            "Recording attention weights (sow_weights=True) was asked for, but linear attention "
            "never forms them. Use sow_weights=False."
        )
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise ValueError(
            "Custom einsums for attention weights cannot be used: linear attention has no weight "
            "matrix. Leave qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls unset."
        )
    if input_positions is not None:
        raise ValueError(
            "input_positions cannot be used here. Rotate queries and keys before attention, for "
            "example with fast_attention.layers.MultiHeadAttention(rotary=True)."
        )


def promote(query: Array, key: Array, value: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """Brings queries, keys and values to one floating type; None is that of all together."""
    if dtype is None:
        dtype = jnp.result_type(query, key, value)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = at_least_float32(dtype)
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def drop_keys(value: Array, rng: Array | None, rate: float, broadcast: bool) -> Array:
    """Drops whole keys ``[*B, S, K, V]`` at a rate; the others are scaled to make up for them."""
    if rng is None:
        raise ValueError(
            f"dropout_rate={rate} needs dropout_rng, a JAX random key; or pass deterministic=True."
        )
    if rate >= 1:
        return jnp.zeros_like(value)
    leading = (1,) * (value.ndim - 3) if broadcast else value.shape[:-3]
    heads = 1 if broadcast else value.shape[-2]
    keep = jax.random.bernoulli(rng, 1 - rate, (*leading, value.shape[-3], heads, 1))
    return jnp.where(keep, value / (1 - rate), 0).astype(value.dtype)
