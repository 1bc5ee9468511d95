"""What every implementation of linear attention receives, checked and in one layout."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear.state import LinearAttentionState

Output = Literal["mean", "sum", "parts"]

SavedStates = Literal["all", "few"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static choices of one call.

    Attributes:
      feature_map: the map applied to queries and keys.
      causal: position t sees keys 0..t.
      output: "mean" divides by the sum of weights; "sum" returns the numerator at its true scale;
        "parts" returns numerator, denominator and their common log-scale, to be merged.
      epsilon: denominators not above it in size are inverted as ``den / epsilon^2``.
      chunk_size: positions handled at once, None for the implementation's own choice.
      unroll: chunks unrolled in the compiled loop, None for the same.
      saved_states: "all" states between chunks are kept for the backward pass, or a "few"; None
        for the implementation's own choice.
      precision: of the products of features with values (exponents are always exact).
      complete: factors that cancel under normalisation are computed all the same, because a state
        or the parts are read elsewhere.
    """

    feature_map: FeatureMap
    causal: bool
    output: Output = "mean"
    epsilon: float = 0.0
    chunk_size: int | None = None
    unroll: int | None = None
    saved_states: SavedStates | None = None
    precision: jax.lax.PrecisionLike = None
    complete: bool = False

    @property
    def exact_scale(self) -> bool:
        """Whether factors that cancel under normalisation must be computed."""
        return self.output == "sum" or self.complete


class Inputs(NamedTuple):
    """The arrays of one call. B batch, T queries, S keys, H heads, K key/value heads.

    Attributes:
      query: ``[B, T, H, D]``.
      key: ``[B, S, K, D]``.
      value: ``[B, S, K, V]``.
      parameters: of the feature map; leading axes, if any, broadcast against ``[B, K]``.
      key_mask: bool ``[B, S, K or 1]`` or None; False contributes nothing.
      key_bias: ``[B, S, K or 1]`` or None; a factor ``exp(bias)`` on each key.
      segment_ids: int ``[B, T]`` or None; contiguous runs that do not see each other.
      state: keys seen before, without batch axes beyond B.
    """

    query: Array
    key: Array
    value: Array
    parameters: Parameters
    key_mask: Array | None
    key_bias: Array | None
    segment_ids: Array | None
    state: LinearAttentionState


class Parts(NamedTuple):
    """Attention before its division: ``numerator exp(log_scale) / (denominator exp(log_scale))``.

    Attributes:
      numerator: ``[B, T, H, V]``.
      denominator: ``[B, T, H]``.
      log_scale: ``[B, T, H]``, constant for differentiation, or None for maps without exponents.
    """

    numerator: Array
    denominator: Array
    log_scale: Array | None


def merge_parts(left: Parts, right: Parts) -> Parts:
    """Adds two attentions of the same queries over disjoint keys."""
    if left.log_scale is None or right.log_scale is None:
        return Parts(left.numerator + right.numerator, left.denominator + right.denominator, None)
    scale = jax.lax.stop_gradient(jnp.maximum(left.log_scale, right.log_scale))
    left_factor = jnp.exp(jax.lax.stop_gradient(left.log_scale) - scale)
    right_factor = jnp.exp(jax.lax.stop_gradient(right.log_scale) - scale)
    return Parts(
        left.numerator * left_factor[..., None] + right.numerator * right_factor[..., None],
        left.denominator * left_factor + right.denominator * right_factor,
        scale,
    )


def finish(parts: Parts, output: Output, epsilon: float) -> Array:
    """Divides (or scales back) attention parts, ``[B, T, H, V]``."""
    if output == "mean":
        return parts.numerator * safe_inverse(parts.denominator, epsilon)[..., None]
    if parts.log_scale is None:
        return parts.numerator
    return parts.numerator * jnp.exp(parts.log_scale)[..., None]


def safe_inverse(denominator: Array, epsilon: float) -> Array:
    """``1 / den``, and ``den / epsilon^2`` where ``|den| <= epsilon``; 0 where nothing is seen.

    Continuous, bounded by ``1 / epsilon``, and never flips a sign.
    """
    seen = denominator != 0
    inverse = jnp.where(seen, 1 / jnp.where(seen, denominator, 1), 0)
    if not epsilon:
        return inverse
    return jnp.where(jnp.abs(denominator) > epsilon, inverse, denominator / epsilon**2)


def inverse_slope(denominator: Array, epsilon: float) -> Array:
    """``d log safe_inverse / d denominator``, 0 where nothing is seen.

    Derivatives of ``y = num * safe_inverse(den)`` with respect to den are ``y`` times this.
    """
    seen = denominator != 0
    slope = jnp.where(seen, -1 / jnp.where(seen, denominator, 1), 0)
    return jnp.where(jnp.abs(denominator) > epsilon, slope, -slope) if epsilon else slope
