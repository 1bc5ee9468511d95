"""Local attention: exact softmax over a window, in time and memory O(T W).

Positions lie in blocks of W, position t in block ``t // W``, and attend to their own block and a
few of its neighbours:

    out_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s,
    s in blocks t // W - look_backward .. t // W + look_forward

Reference: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers",
arXiv:2003.05997, section 3; with shared queries and keys Kitaev et al., "Reformer",
arXiv:2001.04451.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width, W window.
"""

from __future__ import annotations

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.local.blocks import tiled_attention
from fast_attention.mechanisms.local.tile import Choices, Sight, most_ahead, most_back
from fast_attention.mechanisms.local.window import (
    Window,
    check_shapes,
    fold_batch,
    make_window,
)
from fast_attention.mechanisms.softmax.blocks import run_bounds


@overload
def local_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window_size: int,
    causal: bool = ...,
    look_backward: int = ...,
    look_forward: int | None = ...,
    exact_window: bool = ...,
    shared_qk: bool = ...,
    key_mask: Array | None = ...,
    segment_ids: Array | None = ...,
    mask: Array | None = ...,
    bias: Array | None = ...,
    distance_bias: Array | None = ...,
    dropout_key: Array | None = ...,
    dropout_rate: float = ...,
    broadcast_dropout: bool = ...,
    precision: jax.lax.PrecisionLike = ...,
    return_logsumexp: Literal[False] = ...,
) -> Array: ...


@overload
def local_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window_size: int,
    causal: bool = ...,
    look_backward: int = ...,
    look_forward: int | None = ...,
    exact_window: bool = ...,
    shared_qk: bool = ...,
    key_mask: Array | None = ...,
    segment_ids: Array | None = ...,
    mask: Array | None = ...,
    bias: Array | None = ...,
    distance_bias: Array | None = ...,
    dropout_key: Array | None = ...,
    dropout_rate: float = ...,
    broadcast_dropout: bool = ...,
    precision: jax.lax.PrecisionLike = ...,
    return_logsumexp: Literal[True],
) -> tuple[Array, Array]: ...


@runs_on_auto_axes
def local_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    *,
    window_size: int,
    causal: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    shared_qk: bool = False,
    key_mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    distance_bias: Float[Array, "heads distances"] | None = None,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    precision: jax.lax.PrecisionLike = None,
    return_logsumexp: bool = False,
) -> Float[Array, "*B T H V"] | tuple[Float[Array, "*B T H V"], Float[Array, "*B T H"]]:
    """Attends within windows. A query that sees no key gives zeros.

    Args:
      query: ``[*B, T, H, D]``, any number of batch axes, any length.
      key: ``[*B, T, K, D]``; K divides H, query head h reads key head ``h // (H / K)``.
      value: ``[*B, T, K, V]``.
      window_size: W, positions in a block.
      causal: position t sees keys 0..t of its window.
      look_backward: blocks in sight before a position's own.
      look_forward: blocks in sight behind it; None is 0 if causal, else 1.
      exact_window: the reach ends ``W * look_backward`` positions before each position and ``W *
        look_forward`` behind it, where otherwise it ends with a block.
      shared_qk: queries and keys are the same vectors (Reformer): keys are divided by their length,
        and the logit of a position's own key is -5e4: it is seen where no other key is.
      key_mask: ``[*B, T]`` bool; a key where it is False is not seen.
      segment_ids: ``[*B, T]`` int; positions see their own run of equal ids.
      mask: bool or 0/1, broadcastable to ``[*B, H, T, T]``, True sees. Its band along the diagonal
        is used; one without a query axis costs least.
      bias: added to the logits, broadcastable to ``[*B, H, T, T]``, in the same way.
      distance_bias: ``[H or 1, far + 1]`` if causal, entry ``t - s`` is added to the logit of query
        t and key s, ``far = W * (look_backward + 1) - 1`` (``W * look_backward`` for an exact
        window); else ``[H or 1, ahead + far + 1]`` and entry ``ahead + t - s`` with
        ``ahead = W * (look_forward + 1) - 1`` (``W * look_forward``).
      dropout_key: random key of the dropout of weights.
      dropout_rate: probability to drop a weight; 0 if there is no key.
      broadcast_dropout: the batch and the heads share the dropped weights.
      precision: of the two products.
      return_logsumexp: also return ``log sum_s exp(logit_ts)``, with which windows of different
        keys can be merged.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of the inputs; the softmax is in float32 (float64 for
      such inputs). With ``return_logsumexp`` also ``[*B, T, H]`` in that type, ``-inf`` for a
      query that sees nothing. Both are differentiable.

    Raises:
      ValueError: for shapes that do not fit or options out of range.
    """
    window = make_window(window_size, causal, look_backward, look_forward, exact_window)
    check_shapes(query, key, value)
    dtype = jnp.result_type(query, key, value)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    if (dropout_key is None) != (dropout_rate == 0):
        raise ValueError(
            f"Dropout takes both a dropout_rate above 0 and a dropout_key, got the rate "
            f"{dropout_rate} and {'no' if dropout_key is None else 'a'} key."
        )
    *batch, length, heads, _ = query.shape
    choices = Choices(
        block=1 if exact_window else window_size,
        # A reach beyond all positions is as good as one to the ends.
        back=window_size * look_backward,
        ahead=window_size * window.look_forward,
        causal=causal,
        shared=shared_qk,
        dropout_rate=dropout_rate,
        share_dropout=broadcast_dropout,
        precision=precision,
    )
    check_distance_bias(distance_bias, heads, choices)
    if length == 0:
        empty = jnp.zeros((*query.shape[:-1], value.shape[-1]), dtype)
        return (empty, jnp.zeros(query.shape[:-1])) if return_logsumexp else empty
    if shared_qk:
        key = normalized(key)
    out, logsumexp = tiled_attention(
        *(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)),
        _sight(window, query.shape[:-1], key_mask, segment_ids, mask, bias),
        distance_bias,
        dropout_key,
        choices,
    )
    out = out.reshape(*batch, *out.shape[1:])
    return (out, logsumexp.reshape(*batch, length, heads)) if return_logsumexp else out


def check_distance_bias(distance_bias: Array | None, heads: int, choices: Choices) -> None:
    """Raises ValueError unless there is one entry for each distance within reach."""
    if distance_bias is None:
        return
    distances = most_ahead(choices) + most_back(choices) + 1
    if distance_bias.ndim != 2 or distance_bias.shape not in ((heads, distances), (1, distances)):
        raise ValueError(
            f"distance_bias must have shape (heads or 1, distances) = ({heads}, {distances}) "
            f"for this window, got {distance_bias.shape}."
        )


def normalized(key: Float[Array, "*B T K D"]) -> Float[Array, "*B T K D"]:
    """Divides keys by their length, in float32 at least; a key of zeros stays."""
    wide = key.astype(at_least_float32(key.dtype))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return jnp.where(square > 0, wide * lax.rsqrt(jnp.where(square > 0, square, 1)), 0).astype(
        key.dtype
    )


def _sight(
    window: Window,
    shape: tuple[int, ...],
    key_mask: Array | None,
    segment_ids: Array | None,
    mask: Array | None,
    bias: Array | None,
) -> Sight:
    """Puts together what queries of `shape` ``(*B, T, H)`` see."""
    *batch, length, heads = shape
    position = jnp.arange(length, dtype=jnp.int32)
    first, last = (bound[None] for bound in window.bounds(position))
    first, last = jnp.maximum(first, 0), jnp.minimum(last, length - 1)
    if segment_ids is not None:
        run_first, run_last = run_bounds(fold_batch("segment_ids", segment_ids, batch, (length,)))
        first, last = jnp.maximum(first, run_first), jnp.minimum(last, run_last)
    if key_mask is not None:
        key_mask = fold_batch("key_mask", key_mask.astype(bool), batch, (length,))
    square = (heads, length, length)
    return Sight(
        first,
        last,
        key_mask,
        None if mask is None else fold_batch("mask", mask, batch, square),
        None if bias is None else fold_batch("bias", bias, batch, square),
    )
