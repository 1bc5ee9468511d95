"""Feature maps that linear attention puts around the one it is given."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import FeatureMap, Features, LogKind, Parameters
from fast_attention.linear.state import LinearAttentionState, with_scale


def with_position_scale(feature_map: FeatureMap) -> FeatureMap:
    """Gives a map without exponents one log-scale a position, to carry a key bias."""
    return WithScale(inner=feature_map) if feature_map.log_kind == "none" else feature_map


def match_scales(
    feature_map: FeatureMap, state: LinearAttentionState | None
) -> tuple[FeatureMap, LinearAttentionState | None]:
    """Makes a map and a state from before agree on whether there are scales."""
    if state is None:
        return feature_map, None
    if state.log_scale is not None:
        return with_position_scale(feature_map), state
    return feature_map, state if feature_map.log_kind == "none" else with_scale(state)


@dataclasses.dataclass(frozen=True)
class Wrapped(FeatureMap):
    """A map that changes another one.

    Attributes:
      inner: the other one.
    """

    inner: FeatureMap = dataclasses.field(kw_only=True)

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns M of the inner map."""
        return self.inner.num_features(parameters, head_dim)


@dataclasses.dataclass(frozen=True)
class WithScale(Wrapped):
    """A map without exponents, given one log-scale a position to carry a key bias."""

    log_kind: ClassVar[LogKind] = "position"

    def apply(
        self, x: Array, parameters: Parameters, *, is_query: bool, exact_scale: bool
    ) -> Features:
        """Returns the inner features, with a log-scale of 0."""
        features = self.inner.apply(x, parameters, is_query=is_query, exact_scale=exact_scale)
        return Features(features.values, jnp.zeros_like(x[..., :1]))
