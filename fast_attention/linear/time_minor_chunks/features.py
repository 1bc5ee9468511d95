"""Features of a chunk whose positions lie in lanes.

For products in bfloat16, maps that are a function of ``W x + c`` take W in two bfloat16 parts, one
product of ``[x, x]`` and ``[W_hi; W_lo]``: a float32 product takes six of that size on a TPU. Their
logarithms are to base 2, the constant folded into W. Other maps and types use the map itself.

Letters are those of :mod:`.chunk`; P is an axis of weights, 1 or as long as the axis it stands for.
"""

from __future__ import annotations

import functools
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

TILE = 16
"""Rows of a tile of bfloat16."""


class FeatureFunctions(NamedTuple):
    """A feature map and its parameters as functions of chunks.

    Attributes:
      exponential: whether the functions return logarithms of features.
      of_queries: from ``[B, K, G, D, C]`` to ``[B, K, G, C, M]``, float32, the axis G optional.
      of_keys: from ``[B, K, D, C]``, a bias ``[B, K or 1, C]`` or None, and which keys are seen
        (the same shape) or None for all, to ``[B, K, C, M]``. Keys that are not seen are 0.
      base_2: whether logarithms are to base 2.
      weights: arrays made of the map's parameters, once a call.
      weights_of: makes them.
      pullable_queries: the function of queries for reverse mode; its first argument are weights.
      pullable_keys: the same of keys.
    """

    exponential: bool
    of_queries: Callable[[Array], Array]
    of_keys: Callable[[Array, Array | None, Array | None], Array]
    base_2: bool
    weights: Any
    weights_of: Callable[[Any], Any]
    pullable_queries: Callable[[Any, Array], Array]
    pullable_keys: Callable[[Any, Array, Array | None, Array | None], Array]

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
    if low and _is_affine(plan.feature_map):
        return _of_products(plan, inputs, exponential)
    return _of_map(plan, inputs, exponential)


def is_served(feature_map: FeatureMap, parameters: Any, width: int) -> bool:
    """Returns whether features are exponentials, one exponent for each, or have no exponents."""
    if feature_map.log_kind == "position":
        return False
    if feature_map.log_kind == "none" or _is_affine(feature_map):
        return True
    x = jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32)
    features = jax.eval_shape(
        lambda x, parameters: feature_map.apply(x, parameters, is_query=False, exact_scale=True),
        x,
        parameters,
    )
    return features.values is None


_ELEMENTWISE = (ElementwiseFeatures, SignedElementwiseFeatures, ExponentialFeatures)


def _is_affine(feature_map: FeatureMap) -> bool:
    if isinstance(feature_map, TunedFeatures):
        return True
    return type(feature_map) in _ELEMENTWISE or why_not_affine(feature_map) is None


def _of_map(plan: Plan, inputs: Inputs, exponential: bool) -> FeatureFunctions:
    dtype = inputs.state.kv.dtype

    def apply(parameters: Any, x: Array, *, is_query: bool) -> Array:
        rows = jnp.swapaxes(x, -1, -2).astype(dtype)
        features = plan.feature_map.apply(
            rows, parameters, is_query=is_query, exact_scale=plan.exact_scale
        )
        return features.log if exponential else features.shift(None)  # pyright: ignore[reportReturnType]

    def queries(parameters: Any, query: Array) -> Array:
        if query.ndim == 4:
            return apply(parameters, query, is_query=True)
        b, k, g, d, c = query.shape
        # Parameters may differ by key head: queries of one head are one axis of positions.
        rows = jnp.swapaxes(query, 2, 3).reshape(b, k, d, g * c)
        return apply(parameters, rows, is_query=True).reshape(b, k, g, c, -1)

    def keys(parameters: Any, key: Array, bias: Array | None, seen: Array | None) -> Array:
        x = apply(parameters, key, is_query=False)
        if bias is not None:
            x = x + bias[..., None]
        if seen is None:
            return x
        return jnp.where(seen[..., None], x, MASKED_LOG if exponential else 0)

    parameters = inputs.parameters
    return FeatureFunctions(
        exponential=exponential,
        of_queries=functools.partial(queries, parameters),
        of_keys=functools.partial(keys, parameters),
        base_2=False,
        weights=parameters,
        weights_of=lambda parameters: parameters,
        pullable_queries=queries,
        pullable_keys=keys,
    )


class _Weights(NamedTuple):
    """Of a map that is a function of ``W x + c``.

    Attributes:
      query: W of queries, ``[P, P, D, M]``.
      query_offset: c, ``[P, P, 1, M]``, or None for 0.
      key: of keys.
      key_offset: the same.
      tuned: parameters of a tuned map, float32; else None.
    """

    query: Array
    query_offset: Array | None
    key: Array
    key_offset: Array | None
    tuned: Any


def _of_products(plan: Plan, inputs: Inputs, exponential: bool) -> FeatureFunctions:
    feature_map = plan.feature_map
    unit = LOG2_E if exponential else 1.0
    # Of one key: what the keys of a chunk have in common is made with the chunk.
    one_key = inputs.key[:, :1]

    def affine_of(parameters: Any) -> AffineMap:
        return affine_map(feature_map, parameters, one_key, plan.exact_scale)

    def weights_of(parameters: Any) -> _Weights:
        affine, tuned = affine_of(parameters), None
        if isinstance(feature_map, TunedFeatures):
            if not feature_map.trained:
                parameters = jax.lax.stop_gradient(parameters)
            tuned = jax.tree.map(lambda x: x.astype(jnp.float32), parameters)
        return _Weights(
            _matrix(affine.query, unit),
            _offset(affine.query, unit),
            _matrix(affine.key, unit),
            _offset(affine.key, unit),
            tuned,
        )

    weights, norm = weights_of(inputs.parameters), affine_of(inputs.parameters).norm
    query_parts, key_parts = both_parts(weights.query), both_parts(weights.key)

    epsilon = feature_map.epsilon if isinstance(feature_map, ElementwiseFeatures) else 0.0
    linear = exponential and not epsilon

    def finish(x: Array) -> Array:
        if linear or not isinstance(feature_map, ElementwiseFeatures):
            return x
        if not exponential:
            return feature_map.kernel(x) + epsilon
        return jnp.logaddexp(x / unit, math.log(epsilon)) * unit

    def queries(affine: Callable[..., Array], weights: _Weights, query: Array) -> Array:
        groups = "g" if query.ndim == 5 else ""
        offset = weights.query_offset
        return finish(affine(groups, query, weights.query, query_parts, offset, None))

    def keys(
        affine: Callable[..., Array],
        weights: _Weights,
        key: Array,
        bias: Array | None,
        seen: Array | None,
    ) -> Array:
        common = None
        if exponential:
            common = _common(plan, norm, weights.tuned, key, bias)
            shape = (*key.shape[:2], key.shape[-1])
            if common is not None:
                common = jnp.broadcast_to(common * unit, shape)
            if seen is not None:
                common = jnp.zeros(shape) if common is None else common
                common = jnp.where(seen, common, MASKED_LOG)
        at_once = common if linear else None
        x = finish(affine("", key, weights.key, key_parts, weights.key_offset, at_once))
        if not exponential:
            return x if seen is None else jnp.where(seen[..., None], x, 0)
        return x if linear or common is None else x + common[..., None]

    return FeatureFunctions(
        exponential=exponential,
        of_queries=functools.partial(queries, _affine, weights),
        of_keys=functools.partial(keys, _affine, weights),
        base_2=exponential,
        weights=weights,
        weights_of=weights_of,
        pullable_queries=functools.partial(queries, _pullable_affine),
        pullable_keys=functools.partial(keys, _pullable_affine),
    )


def _common(plan: Plan, norm: float, tuned: Any, key: Array, bias: Array | None) -> Array | None:
    """Returns what is added to all natural log-features of a key, ``[B, K, C]``, or None for 0."""
    total, feature_map = None, plan.feature_map
    if norm:
        total = -norm * jnp.sum(key.astype(jnp.float32) ** 2, axis=-2)
    if isinstance(feature_map, TunedFeatures):
        rows = jnp.swapaxes(key, -1, -2).astype(jnp.float32)
        total = feature_map.common(rows, tuned, is_query=False, exact_scale=plan.exact_scale)
        total = total[..., 0]
    if bias is None:
        return total
    return bias if total is None else total + bias


def _leading(x: Array, rank: int) -> Array:
    """Returns ``[P, P, ...]``, with ``rank`` axes kept."""
    return x.reshape((1,) * (2 + rank - x.ndim) + x.shape)


def _offset(side: Affine, unit: float) -> Array | None:
    """Returns ``[P, P, 1, M]``, or None for 0."""
    return None if side.offset is None else _leading(side.offset * unit, 1)[:, :, None]


def _matrix(side: Affine, unit: float) -> Array:
    """Returns W, ``[P, P, D, M]``."""
    return jnp.swapaxes(_leading(side.weights * unit, 2), -1, -2)


def rounded(x: Array) -> Array:
    """Returns float32 numbers rounded to those of bfloat16."""
    # XLA may leave out a conversion to bfloat16 and back, but not this.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def both_parts(matrix: Array) -> Array:
    """Returns two bfloat16 parts of ``[..., D, M]``, one below the other, ``[..., 2 D, M]``."""
    large = rounded(matrix)
    return jnp.concatenate([large, matrix - large], axis=-2).astype(jnp.bfloat16)


def _affine(
    groups: str,
    x: Array,
    matrix: Array,
    parts: Array,
    offset: Array | None,
    common: Array | None,
) -> Array:
    """Returns ``W x + c + u`` of ``[B, K, *groups, D, C]``, ``[B, K, *groups, C, M]``.

    Args:
      groups: names of axes.
      x: bfloat16 numbers.
      matrix: W; only its gradient is needed.
      parts: of W.
      offset: c, ``[P, P, 1, M]``, or None for 0.
      common: u, ``[B, K, *groups, C]``, or None for 0.
    """
    del matrix
    leading, parts = _alone(parts)
    x = x.astype(jnp.bfloat16)
    operands = [
        (f"bk{groups}dc", jnp.concatenate([x, x], axis=-2)),
        (f"{leading}dm", parts),
    ]
    if leading == "k":
        # XLA on CPU has no product of bfloat16 whose first operand has this axis in second place.
        operands.reverse()
    (left, one), (right, other) = operands
    y = jnp.einsum(f"{left},{right}->bk{groups}cm", one, other, preferred_element_type=jnp.float32)
    if offset is not None:
        y = y + (offset[:, :, None] if groups else offset)
    return y if common is None else y + common[..., None]


def _alone(parts: Array) -> tuple[str, Array]:
    """Returns the names of the leading axes that are not 1, and the array without the others."""
    leading = "".join(name for name, size in zip("bk", parts.shape[:2], strict=True) if size > 1)
    return leading, parts.reshape(*(n for n in parts.shape[:2] if n > 1), *parts.shape[2:])


_pullable_affine = jax.custom_vjp(_affine, nondiff_argnums=(0,))
"""The same for reverse mode: one product, with the first part of W and, for u, with ones."""


def _affine_forward(
    groups: str, x: Array, matrix: Array, parts: Array, offset: Any, common: Any
) -> Any:
    return _affine(groups, x, matrix, parts, offset, common), (x, parts, offset, common)


def _affine_backward(groups: str, residuals: Any, cotangent: Array) -> Any:
    x, parts, offset, common = residuals
    width = parts.shape[-2] // 2
    leading, rows = _alone(parts[:, :, :width])
    # What is multiplied and what is added up are rounded alike: parts of a gradient may cancel.
    low = jax.lax.optimization_barrier(cotangent.astype(jnp.bfloat16))
    if common is not None:
        ones = jnp.ones((*rows.shape[:-2], TILE, rows.shape[-1]), jnp.bfloat16)
        rows = jnp.concatenate([rows, ones], axis=-2)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_rows = product(f"{leading}dm,bk{groups}cm->bk{groups}dc", rows, low)
    d_matrix = product(f"bk{groups}dc,bk{groups}cm->{leading}dm", x.astype(jnp.bfloat16), low)
    d_offset = None
    if offset is not None:
        d_offset = cotangent.sum(axis=(-3, -2) if groups else -2)
        shared = tuple(axis for axis in (0, 1) if parts.shape[axis] == 1)
        d_offset = d_offset.sum(axis=shared, keepdims=True)[:, :, None]
    return (
        d_rows[..., :width, :].astype(x.dtype),
        d_matrix.reshape(*parts.shape[:2], *d_matrix.shape[-2:]),
        None,
        d_offset,
        None if common is None else d_rows[..., width, :],
    )


_pullable_affine.defvjp(_affine_forward, _affine_backward)
