"""Efficient attention: a softmax of queries over channels, and one of keys over positions.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.

Reference: Shen et al., "Efficient Attention: Attention with Linear Complexities",
arXiv:1812.01243.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps import IdentityFeatures, LogFeatures
from fast_attention.linear import Plan, linear_attention
from fast_attention.linear.checks import (
    broadcast_segments,
    check_shapes,
    empty_output,
    is_empty,
    promote_floating,
    split_bias,
)
from fast_attention.mechanisms.efficient.blindspot import attend_to_buckets


@runs_on_auto_axes
def efficient_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    *,
    causal: bool = False,
    blindspot_size: int = 1,
    scale_queries: bool = False,
    normalize_queries: bool = True,
    key_mask: Bool[Array, "*#B S"] | Bool[Array, "*#B S #K"] | None = None,
    key_bias: Float[Array, "*#B S"] | Float[Array, "*#B S #K"] | None = None,
    segment_ids: Int[Array, "*#B T"] | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
) -> Float[Array, "*B T H V"]:
    r"""Attention with D x V summaries of keys and values, in linear time and memory.

        Bidirectional (left) and causal (right):


    .. math::
        y_t = \sum_d \mathrm{softmax}_d(q_t) \sum_s \mathrm{softmax}_s(k_{\cdot d})_s \, v_s
        \qquad
        y_t = \frac{\sum_{s \le t} \sum_d e^{q_{td} + k_{sd}} v_s}
                   {\sum_{s \le t} \sum_d e^{q_{td} + k_{sd}}}

    These are different functions: in the causal one, the weights of a query sum to one over
    channels and positions together, so the softmax of queries cancels. Running maxima (causal:
    over earlier positions only) are subtracted before exponentiation: nothing overflows,
    denominators need no epsilon, and causal outputs do not depend on later tokens. (Within a
    chunk of causal attention without a blindspot, a pair counts as 0 if no channel is within
    about 120 of the sum of the largest entries of its query and its key.)

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``; query head h reads key head ``h // (H / K)``.
      value: ``[*B, S, K, V]``.
      causal: position t sees keys 0..t, S = T. One query over several keys is a step with a cache:
        it sees all keys that are not masked.
      blindspot_size: n > 1 (causal only): positions are split into buckets of n, and a query in
        bucket ``b = t // n`` sees only the keys of complete earlier buckets, 0..n b - 1; the first
        n outputs are zero. For use together with local attention. Buckets count all positions, also
        masked ones.
      scale_queries: multiply softmaxed queries, and so the output, by ``D^(-1/2)``, as in
        linear-attention-transformer; in causal attention the factor cancels.
      normalize_queries: if False, queries are used without softmax (bidirectional only).
      key_mask: ``[*B, S]`` or ``[*B, S, K]``; a key where it is False contributes nothing, whatever
        its values are.
      key_bias: ``[*B, S]`` or ``[*B, S, K]``, added to a key in all channels: a factor
        ``exp(bias)`` on its weights. Biases of -1e4 and less mask the key.
      segment_ids: ``[*B, T]``, self-attention only: positions see their own run of equal ids. Not
        with a blindspot.
      precision: of products of weights and values.
      implementation: of :func:`fast_attention.linear_attention`, which computes causal attention
        without a blindspot and attention within segments; other cases have one implementation.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of query, key and value; sums are in float32 at least.
      A row that sees no key is 0.

    Raises:
      ValueError: for shapes or options that do not fit together.
    """
    step = causal and query.shape[-3] == 1 < key.shape[-3]
    check_shapes(query, key, value, causal and not step, segment_ids)
    _check_options(causal, step, blindspot_size, normalize_queries, segment_ids)
    query, key, value = promote_floating(query, key, value)
    key_bias, key_mask = (_with_heads(x, key) for x in (key_bias, key_mask))
    key_bias, key_mask = split_bias(key_bias, key_mask)
    if causal and blindspot_size == 1:
        return linear_attention(
            query,
            key,
            value,
            Plan(
                LogFeatures(),
                causal=not step,
                precision=precision,
                implementation=implementation,
            ),
            parameters=None,
            key_mask=key_mask,
            key_bias=key_bias,
            segment_ids=segment_ids,
        )
    if is_empty(query, key):
        return empty_output(query, value)
    dtype, compute = query.dtype, at_least_float32(query.dtype)
    query, key, value = (x.astype(compute) for x in (query, key, value))
    if key_bias is not None:
        key = key + key_bias[..., None].astype(compute)
    if causal:
        out, _ = attend_to_buckets(
            query, key, value, blindspot_size, key_mask=key_mask, precision=precision
        )
        return out.astype(dtype)
    if normalize_queries:
        query = jax.nn.softmax(query, axis=-1)
    if scale_queries:
        query = query / math.sqrt(query.shape[-1])
    if segment_ids is None:
        weights = position_softmax(key, key_mask)
        out = _through_summary(query, weights, value, key_mask, precision)
        return out.astype(dtype)
    runs = broadcast_segments(segment_ids, query).reshape(query.shape[:-2])
    out = linear_attention(
        query,
        position_softmax(key, key_mask, runs),
        value,
        Plan(IdentityFeatures(), output="sum", precision=precision, implementation=implementation),
        parameters=None,
        key_mask=key_mask,
        segment_ids=runs,
    )
    return out.astype(dtype)


def _through_summary(
    query: Array,
    weights: Array,
    value: Array,
    key_mask: Array | None,
    precision: jax.lax.PrecisionLike,
) -> Array:
    """Every query reads the same D x V summary of a head."""
    if key_mask is not None:
        value = jnp.where(key_mask[..., None], value, 0)
    summary = jnp.einsum("...skd,...skv->...kdv", weights, value, precision=precision)
    grouped = query.reshape(*query.shape[:-2], value.shape[-2], -1, query.shape[-1])
    out = jnp.einsum("...tkgd,...kdv->...tkgv", grouped, summary, precision=precision)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def position_softmax(
    key: Float[Array, "*B S K D"],
    key_mask: Bool[Array, "*#B S #K"] | None = None,
    runs: Int[Array, "*B S"] | None = None,
) -> Float[Array, "*B S K D"]:
    """Normalises every channel of keys over positions.

    Args:
      key: ``[*B, S, K, D]``.
      key_mask: ``[*B, S, K or 1]``; hidden keys get 0 and do not count.
      runs: ``[*B, S]``, ascending from 0: every run is normalised by itself.

    Returns:
      ``[*B, S, K, D]``; where no key is visible, zeros.
    """
    if key_mask is not None:
        key = jnp.where(key_mask[..., None], key, -jnp.inf)
    largest = lax.stop_gradient(_over_positions(jax.ops.segment_max, jnp.max, key, runs))
    weights = jnp.exp(key - jnp.where(jnp.isfinite(largest), largest, 0))
    total = _over_positions(jax.ops.segment_sum, jnp.sum, weights, runs)
    return weights / jnp.where(total > 0, total, 1)


def _over_positions(of_segments, of_axis, x: Array, runs: Array | None) -> Array:
    """Reduces over positions, or over those of the same run, and keeps the shape broadcastable."""
    if runs is None:
        return of_axis(x, axis=-3, keepdims=True)

    def one_row(x: Array, runs: Array) -> Array:
        length = x.shape[0]
        return of_segments(x, runs, num_segments=length, indices_are_sorted=True)[runs]

    rows = x.reshape(-1, *x.shape[-3:])
    return jax.vmap(one_row)(rows, runs.reshape(-1, runs.shape[-1])).reshape(x.shape)


def _with_heads(x: Array | None, key: Array) -> Array | None:
    """Brings ``[*B, S]`` or ``[*B, S, K or 1]`` to the latter."""
    if x is None:
        return None
    wide = x if x.ndim == key.ndim - 1 else x[..., None]
    shape = key.shape[:-1]
    if wide.ndim != len(shape) or any(
        n not in (1, m) for n, m in zip(wide.shape, shape, strict=True)
    ):
        raise ValueError(
            f"key_mask and key_bias must have shape {shape[:-1]} or {shape} to go with key of "
            f"shape {key.shape}, got {x.shape}."
        )
    return jnp.broadcast_to(wide, (*shape[:-1], wide.shape[-1]))


def _check_options(
    causal: bool,
    step: bool,
    blindspot_size: int,
    normalize_queries: bool,
    segment_ids: Array | None,
) -> None:
    if blindspot_size < 1:
        raise ValueError(f"blindspot_size must be at least 1, got {blindspot_size}.")
    if causal and not normalize_queries:
        raise ValueError(
            "normalize_queries=False is not supported by causal attention, which divides by the "
            "sum of weights. Leave it out, or pass causal=False."
        )
    if blindspot_size == 1:
        return
    if not causal:
        raise ValueError(
            f"blindspot_size={blindspot_size} needs causal attention, but bidirectional attention "
            "was requested: pass causal=True (a layer's causal=True, or "
            "unidirectional=True), or blindspot_size=1."
        )
    if step:
        raise ValueError(
            "With one query over a cache of keys, it is unknown where buckets of blindspot_size="
            f"{blindspot_size} end: decode with init_state, prefill and step."
        )
    if segment_ids is not None:
        raise ValueError(
            f"segment_ids must be None with blindspot_size={blindspot_size}, because buckets "
            "start at multiples of it, not at segments: use one sequence per row, or "
            "blindspot_size=1."
        )
