"""Feature maps as the TPU kernels know them: an affine function of the input, then one function.

Letters: B batch, T length, K key/value heads, D head width, M features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import FeatureMap
from fast_attention.feature_maps.elementwise import (
    ElementwiseFeatures,
    ExponentialFeatures,
    SignedElementwiseFeatures,
    kernel_name,
)
from fast_attention.feature_maps.softmax import HyperbolicFeatures, PositiveFeatures
from fast_attention.feature_maps.tuned import TunedFeatures, TunedParameters

ELEMENTWISE = ("relu", "squared_relu", "elu+1")


class Affine(NamedTuple):
    """Features ``f(W x + c + u(x))`` of queries or keys.

    Attributes:
      weights: W, float32 ``[*B, M, D]``.
      offset: c, ``[*B, M]``, or None for 0.
    """

    weights: Array
    offset: Array | None


class AffineMap(NamedTuple):
    """A feature map in this form.

    Attributes:
      kind: "exp", or a name in :data:`ELEMENTWISE`.
      epsilon: added to elementwise features.
      norm: factor on ``|k|^2``, subtracted from the log-features of keys.
      query: of queries; what all features of one query have in common is left out.
      key: of keys.
      common: the rest of what all log-features of a key have in common, ``[B, S, K]``, or None.
    """

    kind: str
    epsilon: float
    norm: float
    query: Affine
    key: Affine
    common: Array | None


def why_not_affine(feature_map: FeatureMap) -> str | None:
    """Returns why a map has no such form, or None if it has."""
    kind = type(feature_map)
    if kind in (PositiveFeatures, HyperbolicFeatures):
        return None
    if isinstance(feature_map, TunedFeatures) and not feature_map.trained:
        return None
    if isinstance(feature_map, ExponentialFeatures) and not feature_map.epsilon:
        return None
    if kind in (ElementwiseFeatures, SignedElementwiseFeatures):
        assert isinstance(feature_map, ElementwiseFeatures)
        if kernel_name(feature_map.kernel) in ELEMENTWISE:
            return None
    return (
        "The TPU kernels support positive and hyperbolic features, tuned features that are not "
        f"trained, and the elementwise maps {', '.join(ELEMENTWISE)} and exp without epsilon, "
        f"got {feature_map}."
    )


def affine_map(feature_map: FeatureMap, parameters: Any, key: Array, exact: bool) -> AffineMap:
    """Returns a map, served by :func:`why_not_affine`, and its parameters in this form.

    Args:
      feature_map: the map.
      parameters: its parameters.
      key: ``[B, S, K, D]``, masked keys 0.
      exact: features of keys are complete.
    """
    width = key.shape[-1]
    if isinstance(feature_map, TunedFeatures):
        if not feature_map.trained:
            parameters = jax.lax.stop_gradient(parameters)
        return _tuned(feature_map, parameters, key, exact)
    if isinstance(feature_map, ElementwiseFeatures):
        weights = jnp.eye(width) if parameters is None else parameters.astype(jnp.float32)
        if feature_map.normalize_data:
            weights = weights * width**-0.25
        own, name = Affine(weights, None), str(kernel_name(feature_map.kernel))
        return AffineMap(name, feature_map.epsilon, 0.0, own, own, None)
    weights = parameters.astype(jnp.float32) * width**-0.25
    if isinstance(feature_map, HyperbolicFeatures):
        weights = jnp.concatenate([weights, -weights], axis=-2)
    offset = None
    if exact:
        offset = jnp.full(weights.shape[:-1], -0.5 * math.log(weights.shape[-2]))
    return AffineMap(
        "exp", 0.0, 0.5 * width**-0.5, Affine(weights, None), Affine(weights, offset), None
    )


def _tuned(
    feature_map: TunedFeatures, parameters: TunedParameters, key: Array, exact: bool
) -> AffineMap:
    p = jax.tree.map(lambda x: x.astype(jnp.float32), parameters)

    def side(weights: Array, shift: Array) -> Affine:
        leading = jnp.broadcast_shapes(weights.shape[:-2], shift.shape[:-1], p.bias.shape[:-1])
        weights = jnp.broadcast_to(weights, (*leading, *weights.shape[-2:]))
        bias = jnp.broadcast_to(p.bias, (*leading, *p.bias.shape[-1:]))
        shift = jnp.broadcast_to(shift, (*leading, *shift.shape[-1:]))
        moved = jnp.einsum("...md,...d->...m", weights, shift, precision=jax.lax.Precision.HIGHEST)
        if not feature_map.both_signs:
            return Affine(weights, bias - moved)
        return Affine(
            jnp.concatenate([weights, -weights], axis=-2),
            jnp.concatenate([bias - moved, bias + moved], axis=-1),
        )

    heads_first = jnp.swapaxes(key.astype(jnp.float32), 1, 2)
    common = feature_map.common(heads_first, p, is_query=False, exact_scale=exact)
    return AffineMap(
        "exp",
        0.0,
        0.0,
        side(p.query_weight, p.query_shift),
        side(p.key_weight, p.key_shift),
        jnp.swapaxes(common[..., 0], 1, 2),
    )
