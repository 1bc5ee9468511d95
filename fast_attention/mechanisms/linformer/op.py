"""Linformer: softmax attention over keys and values projected along the length.

Shape letters: B batch, T queries, L keys at most, R projected keys, H heads, K key/value heads, D
head width, V value width.

Reference: Wang et al., "Linformer: Self-Attention with Linear Complexity", arXiv:2006.04768.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Float
from fast_attention.softmax_attention import make_softmax_attention


@runs_on_auto_axes
def linformer_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    key_projection: Float[Array, "L R"],
    value_projection: Float[Array, "L R"],
    *,
    key_mask: Any = None,
    causal: bool = False,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*B T H V"]:
    r"""Attends to R mixtures of all positions, in time and memory linear in T and L.

    .. math::
        y_t = \sum_r \mathrm{softmax}_r\big(q_t \cdot (E^T k)_r / \sqrt{D}\big) \, (F^T v)_r

    Args:
      query: ``[*B, T, H, D]``, of any length.
      key: ``[*B, S, K, D]``, S <= L; query head h reads key head ``h // (H / K)``.
      value: ``[*B, S, K, V]``.
      key_projection: E, ``[L, R]``; for fewer keys, its first S rows are used.
      value_projection: F, ``[L, R]``.
      key_mask: must be None, because a mixture of all positions cannot exclude one.
      causal: must be False, for the same reason.
      dropout_rng: random key of dropout.
      dropout_rate: probability to drop an attention weight.
      broadcast_dropout: the batch and the heads share the dropped weights.
      precision: of all products.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of query, key and value; sums are in float32 at least.

    Raises:
      ValueError: for more keys than L, a mask, causality, or shapes that do not fit.
    """
    refuse_masks(key_mask, causal)
    length, longest = key.shape[-3], key_projection.shape[0]
    if key_projection.shape != value_projection.shape:
        raise ValueError(
            "key_projection and value_projection must both be [length, projected], got "
            f"{key_projection.shape} and {value_projection.shape}."
        )
    if value.shape[-3] != length or length > longest:
        raise ValueError(
            f"Linformer's projections are made for at most {longest} keys, and as many values, got "
            f"key {key.shape} and value {value.shape} ([*B, length, heads, width]). Cut the input, "
            "make longer projections, or use a mechanism for any length, such as "
            "make_efficient_attention."
        )
    dtype = jnp.result_type(query, key, value)
    compute = at_least_float32(dtype)

    def project(x: Array, projection: Array) -> Array:
        return jnp.einsum(
            "...lkd,lr->...rkd",
            x.astype(compute),
            projection[:length].astype(compute),
            precision=precision,
        )

    out = make_softmax_attention()(
        query.astype(compute),
        project(key, key_projection),
        project(value, value_projection),
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
    )
    return out.astype(dtype)


def refuse_masks(mask: Any, causal: bool) -> None:
    """Raises ValueError for arguments that would mask positions."""
    if mask is not None:
        raise ValueError(
            "Linformer mixes all positions along the length before attention, so keys cannot be "
            "masked: leave the mask out, or use a mechanism that supports masks, such as "
            "make_efficient_attention."
        )
    if causal:
        raise ValueError(
            "Linformer mixes all positions along the length before attention, so every query "
            "would see later tokens: it cannot be causal. Use another mechanism, such as "
            "make_efficient_attention(unidirectional=True)."
        )
