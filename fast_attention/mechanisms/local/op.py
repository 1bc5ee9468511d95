"""Local attention: exact softmax over a window, in time and memory O(T W).

Positions are in blocks of W, position t in block ``t // W``, and attend to their own block and
neighbouring blocks:

    out_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s,
    s in blocks t // W - look_backward .. t // W + look_forward

Reference: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers",
arXiv:2003.05997, section 3; with shared queries and keys Kitaev et al., "Reformer",
arXiv:2001.04451.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width, W window.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.bundles import bundle_of
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.checks import fold_batch
from fast_attention.mechanisms.local.blocks import tiled_attention
from fast_attention.mechanisms.local.tile import Choices, Sight
from fast_attention.mechanisms.local.window import LocalWindow, check_shapes
from fast_attention.mechanisms.shared_qk import unit_keys
from fast_attention.mechanisms.softmax.blocks import run_bounds


@runs_on_auto_axes
def local_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    window: LocalWindow | None = None,
    *,
    shared_qk: bool = False,
    key_mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    dropout: Dropout | None = None,
    precision: jax.lax.PrecisionLike = None,
    **options: Any,
) -> Float[Array, "*B T H V"]:
    """Attends within windows. A query that sees no key gives zeros.

    Args:
      query: ``[*B, T, H, D]``, any number of batch axes, any length.
      key: ``[*B, T, K, D]``; K divides H, query head h reads key head ``h // (H / K)``.
      value: ``[*B, T, K, V]``.
      window: which keys a position sees; None takes it from `options`.
      shared_qk: queries and keys are the same vectors (Reformer): keys are divided by their norm,
        and the logit of a position's own key is -5e4, so that it counts only if no other key is
        seen.
      key_mask: ``[*B, T]`` bool; a key where it is False is not seen.
      segment_ids: ``[*B, T]`` int; positions see their own run of equal ids.
      mask: bool or 0/1, broadcastable to ``[*B, H, T, T]``, True sees. Only the band along the
        diagonal is used; a mask without a query axis is cheapest.
      bias: added to the logits, broadcastable to ``[*B, H, T, T]``; only the band is used.
      dropout: of the weights.
      precision: of the two products.
      **options: fields of :class:`LocalWindow`, such as ``window_size=64, causal=True``.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of the inputs; the softmax is in float32 (float64 for
      float64 inputs).

    Raises:
      ValueError: for shapes that do not fit.
    """
    window = bundle_of(LocalWindow, "window", window, options)
    check_shapes(query, key, value)
    dtype = jnp.result_type(query, key, value)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    if query.shape[-3] == 0:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), dtype)
    assert window.look_forward is not None
    choices = Choices(
        block=1 if window.exact_window else window.window_size,
        # A reach beyond all positions is as good as one to the ends.
        back=window.window_size * window.look_backward,
        ahead=window.window_size * window.look_forward,
        causal=window.causal,
        shared=shared_qk,
        dropout_rate=0.0 if dropout is None else dropout.rate,
        share_dropout=dropout is None or dropout.broadcast,
        precision=precision,
    )
    if shared_qk:
        key = unit_keys(key)
    out = tiled_attention(
        *(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)),
        _sight(window, query.shape[:-1], key_mask, segment_ids, mask, bias),
        None if dropout is None else dropout.key,
        choices,
    )
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _sight(
    window: LocalWindow,
    shape: tuple[int, ...],
    key_mask: Array | None,
    segment_ids: Array | None,
    mask: Array | None,
    bias: Array | None,
) -> Sight:
    """Combines the masks and biases of queries of `shape` ``(*B, T, H)``."""
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
