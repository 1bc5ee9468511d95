"""Features of a chunk whose positions lie in lanes.

For products in bfloat16, maps that are a function of ``W x + c`` take W in two bfloat16 parts, one
product of ``[x, x]`` and ``[W_hi; W_lo]``: a float32 product takes six of that size on a TPU. Their
logarithms are to base 2, the constant folded into W. Other maps and types use the map itself.

Letters are those of :mod:`.chunk`; P is an axis of weights, 1 or as long as the axis it stands for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import FeatureMap
from fast_attention.feature_maps.elementwise import (
    ElementwiseFeatures,
    ExponentialFeatures,
    SignedElementwiseFeatures,
)
from fast_attention.feature_maps.tuned import TunedFeatures
from fast_attention.linear.pallas_tpu.affine import Affine, AffineMap, affine_map, why_not_affine
from fast_attention.linear.state import MASKED_LOG
from fast_attention.linear.types import Inputs, Plan

LOG2_E = math.log2(math.e)


class FeatureFunctions(NamedTuple):
    """A feature map and its parameters as functions of chunks.

    Attributes:
      exponential: whether the functions return logarithms of features.
      of_queries: from ``[B, K, G, D, C]`` to ``[B, K, G, C, M]``, float32, the axis G optional.
      of_keys: from ``[B, K, D, C]``, a bias ``[B, K or 1, C]`` or None, and which keys are seen
        (the same shape) or None for all, to ``[B, K, C, M]``. Keys that are not seen are 0.
      base_2: whether logarithms are to base 2.
    """

    exponential: bool
    of_queries: Callable[[Array], Array]
    of_keys: Callable[[Array, Array | None, Array | None], Array]
    base_2: bool

    @property
    def unit(self) -> float:
        """The logarithm of e."""
        return LOG2_E if self.base_2 else 1.0

    @property
    def log_of_2(self) -> float:
        """The logarithm of 2."""
        return 1.0 if self.base_2 else math.log(2)

    def exp(self, x: Array) -> Array:
        """Inverse of the logarithm."""
        return jnp.exp2(x) if self.base_2 else jnp.exp(x)

    def log(self, x: Array) -> Array:
        """The logarithm."""
        return jnp.log2(x) if self.base_2 else jnp.log(x)


def feature_functions(plan: Plan, inputs: Inputs, *, low: bool) -> FeatureFunctions:
    """Returns the functions of a call.

    Args:
      plan: static choices.
      inputs: arrays.
      low: products take bfloat16 operands.
    """
    exponential = plan.feature_map.log_kind == "feature"
    feature_map = _with_fixed_parameters(plan.feature_map)
    if low and _is_affine(feature_map):
        return _of_products(plan, inputs, feature_map, exponential)
    return _of_map(plan, inputs, exponential)


def is_served(feature_map: FeatureMap, parameters: Any, width: int) -> bool:
    """Returns whether features are exponentials, one exponent for each, or have no exponents."""
    if feature_map.log_kind == "position":
        return False
    if feature_map.log_kind == "none" or _is_affine(_with_fixed_parameters(feature_map)):
        return True
    x = jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32)
    features = jax.eval_shape(
        lambda x, parameters: feature_map.apply(x, parameters, is_query=False, exact_scale=True),
        x,
        parameters,
    )
    return features.values is None


def _with_fixed_parameters(feature_map: FeatureMap) -> FeatureMap:
    """Returns the map that has the same features; nothing here is differentiated."""
    if isinstance(feature_map, TunedFeatures) and feature_map.trained:
        return dataclasses.replace(feature_map, trained=False)
    return feature_map


_ELEMENTWISE = (ElementwiseFeatures, SignedElementwiseFeatures, ExponentialFeatures)


def _is_affine(feature_map: FeatureMap) -> bool:
    return type(feature_map) in _ELEMENTWISE or why_not_affine(feature_map) is None


def _of_map(plan: Plan, inputs: Inputs, exponential: bool) -> FeatureFunctions:
    dtype = inputs.state.kv.dtype

    def apply(x: Array, *, is_query: bool) -> Array:
        rows = jnp.swapaxes(x, -1, -2).astype(dtype)
        features = plan.feature_map.apply(
            rows, inputs.parameters, is_query=is_query, exact_scale=plan.exact_scale
        )
        return features.log if exponential else features.shift(None)  # pyright: ignore[reportReturnType]

    def of_queries(query: Array) -> Array:
        if query.ndim == 4:
            return apply(query, is_query=True)
        b, k, g, d, c = query.shape
        # Parameters may differ by key head: queries of one head are one axis of positions.
        rows = jnp.swapaxes(query, 2, 3).reshape(b, k, d, g * c)
        return apply(rows, is_query=True).reshape(b, k, g, c, -1)

    def of_keys(key: Array, bias: Array | None, seen: Array | None) -> Array:
        x = apply(key, is_query=False)
        if bias is not None:
            x = x + bias[..., None]
        if seen is None:
            return x
        return jnp.where(seen[..., None], x, MASKED_LOG if exponential else 0)

    return FeatureFunctions(exponential, of_queries, of_keys, False)


def _of_products(
    plan: Plan, inputs: Inputs, feature_map: FeatureMap, exponential: bool
) -> FeatureFunctions:
    unit = LOG2_E if exponential else 1.0
    # Of one key: what the keys of a chunk have in common is made with the chunk.
    affine = affine_map(feature_map, inputs.parameters, inputs.key[:, :1], plan.exact_scale)
    query_parts, query_offset = _both_parts(affine.query, unit), _offset(affine.query, unit)
    key_parts, key_offset = _both_parts(affine.key, unit), _offset(affine.key, unit)

    def finish(x: Array) -> Array:
        if not isinstance(feature_map, ElementwiseFeatures):
            return x
        if not exponential:
            return feature_map.kernel(x) + feature_map.epsilon
        if feature_map.epsilon:
            return jnp.logaddexp(x / unit, math.log(feature_map.epsilon)) * unit
        return x

    def of_queries(query: Array) -> Array:
        x = _project(query, query_parts, "g" if query.ndim == 5 else "")
        if query_offset is not None:
            x = x + (query_offset if query.ndim == 4 else query_offset[:, :, None])
        return finish(x)

    def of_keys(key: Array, bias: Array | None, seen: Array | None) -> Array:
        x = _project(key, key_parts, "")
        if key_offset is not None:
            x = x + key_offset
        x = finish(x)
        if not exponential:
            return x if seen is None else jnp.where(seen[..., None], x, 0)
        common = _common(plan, inputs, feature_map, affine, key, bias)
        if common is not None:
            common = common * unit
        if seen is not None:
            shape = (*key.shape[:2], key.shape[-1])
            common = jnp.zeros(shape) if common is None else common
            common = jnp.where(seen, common, MASKED_LOG)
        return x if common is None else x + common[..., None]

    return FeatureFunctions(exponential, of_queries, of_keys, exponential)


def _common(
    plan: Plan,
    inputs: Inputs,
    feature_map: FeatureMap,
    affine: AffineMap,
    key: Array,
    bias: Array | None,
) -> Array | None:
    """Returns what is added to all natural log-features of a key, ``[B, K, C]``, or None for 0."""
    total = None
    if affine.norm:
        total = -affine.norm * jnp.sum(key.astype(jnp.float32) ** 2, axis=-2)
    if isinstance(feature_map, TunedFeatures):
        p = jax.tree.map(lambda x: x.astype(jnp.float32), inputs.parameters)
        rows = jnp.swapaxes(key, -1, -2).astype(jnp.float32)
        total = feature_map.common(rows, p, is_query=False, exact_scale=plan.exact_scale)[..., 0]
    if bias is None:
        return total
    return bias if total is None else total + bias


def _leading(x: Array, rank: int) -> Array:
    """Returns ``[P, P, ...]``, with ``rank`` axes kept."""
    return x.reshape((1,) * (2 + rank - x.ndim) + x.shape)


def _offset(side: Affine, unit: float) -> Array | None:
    """Returns ``[P, P, 1, M]``, or None for 0."""
    return None if side.offset is None else _leading(side.offset * unit, 1)[:, :, None]


def _both_parts(side: Affine, unit: float) -> Array:
    """Returns two bfloat16 parts of W, one after the other, ``[P, P, 2 D, M]``."""
    matrix = jnp.swapaxes(_leading(side.weights * unit, 2), -1, -2)
    # XLA may leave out a conversion to bfloat16 and back, but not this.
    large = jax.lax.reduce_precision(matrix, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([large, matrix - large], axis=-2).astype(jnp.bfloat16)


def _project(x: Array, parts: Array, groups: str) -> Array:
    """Returns ``W x`` of ``[B, K, *groups, D, C]``, ``[B, K, *groups, C, M]``."""
    leading = "".join(name for name, size in zip("bk", parts.shape[:2], strict=True) if size > 1)
    parts = parts.reshape(*(n for n in parts.shape[:2] if n > 1), *parts.shape[2:])
    return jnp.einsum(
        f"bk{groups}dc,{leading}dm->bk{groups}cm",
        jnp.concatenate([x, x], axis=-2),
        parts,
        preferred_element_type=jnp.float32,
    )
