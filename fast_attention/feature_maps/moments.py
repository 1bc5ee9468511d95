"""Means and covariances of queries and keys per head, over visible positions.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, G = H / K, D head width,
N positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.feature_maps.subset import spread_out


class Spread(NamedTuple):
    """Mean and covariance of the vectors of one head.

    Attributes:
      weight: ``[*B, K]``, the number of vectors, or their weight in a running average.
      mean: ``[*B, K, D]``.
      covariance: ``[*B, K, D, D]``.
    """

    weight: Float[Array, "*B K"]
    mean: Float[Array, "*B K D"]
    covariance: Float[Array, "*B K D D"]


class Moments(NamedTuple):
    """Moments of queries and keys; queries that share a key head are pooled."""

    query: Spread
    key: Spread


def measure(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    *,
    query_mask: Bool[Array, "*#B T #K"] | None = None,
    key_mask: Bool[Array, "*#B S #K"] | None = None,
    pooled: bool = False,
    most: int | None = None,
) -> Moments:
    """Measures the moments of queries and keys, without gradients.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``, H a multiple of K.
      query_mask: ``[*B, T, K or 1]``; queries where it is False do not count, whatever their values
        are.
      key_mask: ``[*B, S, K or 1]``; the same for keys.
      pooled: pool the rows of a batch; if False each row has its own moments.
      most: maximum number of positions per row to measure, spread over those that count, see
        :func:`fast_attention.feature_maps.subset.spread_out`; None measures all.

    Returns:
      Moments with leading axes ``[*B, K]``, or ``[K]`` if pooled; float32, float64 for float64.
    """
    *batch_shape, _, heads, width = query.shape
    kv_heads = key.shape[-2]
    batch = math.prod(batch_shape)
    grouped = query.reshape(batch, -1, kv_heads, heads // kv_heads, width)
    sides = []
    for x, mask in ((grouped, query_mask), (key.reshape(batch, -1, kv_heads, 1, width), key_mask)):
        visible = None
        if mask is not None:
            shape = (*batch_shape, *mask.shape[-2:])
            visible = jnp.broadcast_to(mask, shape).reshape(batch, *mask.shape[-2:])
        if most is not None and export.is_symbolic_dim(x.shape[1]):
            # Whether there are more is known only when the program runs.
            visible = jnp.ones((batch, x.shape[1], 1), bool) if visible is None else visible
            x, visible = spread_out(x, visible, most)
        elif most is not None and most < x.shape[1]:
            x, visible = spread_out(x, visible, most)
        spread = _spread(x, visible, pooled)
        sides.append(
            jax.tree.map(
                lambda s: s[0] if pooled else s.reshape(*batch_shape, *s.shape[1:]), spread
            )
        )
    return Moments(*sides)


def merge_spreads(left: Spread, right: Spread) -> Spread:
    """Returns the spread of the union of both sets of vectors, by their weights."""
    weight = left.weight + right.weight
    share = right.weight / jnp.where(weight > 0, weight, 1)
    difference = right.mean - left.mean
    outer = difference[..., :, None] * difference[..., None, :]
    column, square = share[..., None], share[..., None, None]
    covariance = (
        (1 - square) * left.covariance + square * right.covariance + square * (1 - square) * outer
    )
    return Spread(weight, left.mean + column * difference, covariance)


def merge_moments(left: Moments, right: Moments) -> Moments:
    """Merges queries with queries and keys with keys."""
    return Moments(merge_spreads(left.query, right.query), merge_spreads(left.key, right.key))


def running_average(old: Moments, new: Moments, decay: float) -> Moments:
    """Returns ``decay * old + (1 - decay) * new``, without the bias of an empty start.

    Heads without vectors in ``new`` keep their old moments.
    """

    def weighted(moments: Moments, weight: Callable[[Array], Array]) -> Moments:
        return Moments(*(side._replace(weight=weight(side.weight)) for side in moments))

    faded = weighted(old, lambda weight: decay * weight)
    fresh = weighted(new, lambda weight: (1 - decay) * (weight > 0).astype(weight.dtype))
    return merge_moments(faded, fresh)


def no_moments(num_heads: int, head_dim: int) -> Moments:
    """Returns empty moments of weight 0, ``[K, ...]`` in float32."""
    side = Spread(
        jnp.zeros(num_heads, jnp.float32),
        jnp.zeros((num_heads, head_dim), jnp.float32),
        jnp.zeros((num_heads, head_dim, head_dim), jnp.float32),
    )
    return Moments(side, side)


def _spread(x: Array, visible: Array | None, pooled: bool) -> Spread:
    """Measures ``[B, N, K, G, D]`` in two passes: means may be far larger than deviations."""
    x = jax.lax.stop_gradient(x).astype(at_least_float32(x.dtype))
    if pooled:
        x = x.reshape(1, -1, *x.shape[2:])
        visible = None if visible is None else visible.reshape(1, -1, visible.shape[-1])
    batch, length, kv_heads, group, width = x.shape
    # Head by head, each a matrix product: as one contraction XLA on CPU takes ten times as long.
    rows = jnp.swapaxes(x, 1, 2).reshape(batch, kv_heads, length * group, width)
    if visible is None:
        count = jnp.full((batch, kv_heads), length * group, x.dtype)
    else:
        visible = jnp.repeat(jnp.swapaxes(visible, 1, 2), group, axis=2)[..., None]
        rows = jnp.where(visible, rows, 0)
        seen = visible.sum((2, 3)).astype(x.dtype)
        count = jnp.broadcast_to(seen, (batch, kv_heads))
    divisor = jnp.maximum(count, 1)[..., None]
    mean = rows.sum(2) / divisor
    centred = rows - mean[..., None, :]
    if visible is not None:
        centred = jnp.where(visible, centred, 0)
    # One batch axis: with two XLA on CPU takes twice as long.
    flat = centred.reshape(batch * kv_heads, length * group, width)
    products = jnp.matmul(jnp.swapaxes(flat, 1, 2), flat, precision=jax.lax.Precision.HIGHEST)
    products = products.reshape(batch, kv_heads, width, width)
    return Spread(count, mean, products / divisor[..., None])


def measure_visible(
    query: Array, key: Array, query_mask: Array | None, key_mask: Array | None
) -> Moments:
    """Measures a pooled batch, for each key head; masks are ``[B, T]`` and ``[B, S]``."""
    if query_mask is None and query.shape[-3] == key.shape[-3]:
        query_mask = key_mask
    masks = [None if mask is None else mask[..., None] for mask in (query_mask, key_mask)]
    return measure(query, key, query_mask=masks[0], key_mask=masks[1], pooled=True)
