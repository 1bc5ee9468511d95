"""Random features of the softmax kernel ``exp(q . k / sqrt(D))``.

With ``x = q D^(-1/4)``, ``y = k D^(-1/4)`` and rows w of the projection W (``[M, D]``), each map is
an unbiased estimate of ``exp(x . y)`` if every single row is N(0, I):

* positive: ``M^(-1/2) exp(w.x - |x|^2/2)`` (lemma 1, "FAVOR+"),
* hyperbolic: ``(2 M)^(-1/2) exp(+-w.x - |x|^2/2)``, 2 M features of smaller variance (lemma 1),
* trigonometric: ``M^(-1/2) exp(|x|^2/2) [cos w.x, sin w.x]``, 2 M signed features (section 2.3).

Reference: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.base import FeatureMap, Features, LogKind, Parameters, project
from fast_attention.feature_maps.projections import draw_projection


@dataclasses.dataclass(frozen=True)
class _ProjectedSoftmaxMap(FeatureMap):
    """Common base of the three estimators: a projection drawn by name.

    Attributes:
      num_rows: rows of the projection.
      projection: its name in :data:`fast_attention.feature_maps.projections.PROJECTIONS`.
    """

    num_rows: int = 256
    projection: str = "orthogonal"

    features_per_row: ClassVar[int] = 1

    def init(self, key: Array, head_dim: int) -> Float[Array, "M D"]:
        """Draws the projection ``[num_rows, head_dim]``."""
        return draw_projection(self.projection, key, self.num_rows, head_dim)

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns M."""
        del head_dim
        return parameters.shape[-2] * self.features_per_row

    def _scaled(self, x: Array) -> Array:
        return x * x.shape[-1] ** -0.25

    def _half_log_count(self, projected: Array) -> float:
        return 0.5 * math.log(projected.shape[-1] * self.features_per_row)


@dataclasses.dataclass(frozen=True)
class PositiveFeatures(_ProjectedSoftmaxMap):
    """Positive features ``M^(-1/2) exp(w.x - |x|^2/2)`` (arXiv:2009.14794, lemma 1)."""

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: Array,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns M log-features a position; see the class."""
        x = self._scaled(x)
        return Features(None, self._log_features(x, project(x, parameters), is_query, exact_scale))

    def _log_features(self, x: Array, projected: Array, is_query: bool, exact: bool) -> Array:
        # For a query the norm is common to all its features and cancels in the ratio.
        log = projected
        if exact or not is_query:
            log = log - 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)
        return log - self._half_log_count(projected) if exact else log


@dataclasses.dataclass(frozen=True)
class HyperbolicFeatures(PositiveFeatures):
    """Positive features with each row used in both signs, 2 M of them (lemma 1, "SM_hyp+")."""

    features_per_row: ClassVar[int] = 2

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: Array,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns 2 M log-features per position; see the class."""
        x = self._scaled(x)
        half = project(x, parameters)
        both = jnp.concatenate(
            [
                self._log_features(x, half, is_query, exact_scale),
                self._log_features(x, -half, is_query, exact_scale),
            ],
            axis=-1,
        )
        return Features(None, both)


@dataclasses.dataclass(frozen=True)
class TrigonometricFeatures(_ProjectedSoftmaxMap):
    """Signed features ``M^(-1/2) exp(|x|^2/2) [cos w.x, sin w.x]`` (arXiv:2009.14794, eq. 5).

    Row sums of the estimated attention matrix can vanish or change sign, so outputs can be
    arbitrarily large if norms are not small; prefer :class:`PositiveFeatures`.
    """

    log_kind: ClassVar[LogKind] = "position"
    signed: ClassVar[bool] = True
    features_per_row: ClassVar[int] = 2

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: Array,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns 2 M features and one log-scale per position; see the class."""
        x = self._scaled(x)
        projected = project(x, parameters)
        values = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], axis=-1)
        # One row gives two features whose products sum to cos(w.(x-y)): the count is that of rows.
        values = values * projected.shape[-1] ** -0.5
        if is_query and not exact_scale:
            return Features(values, jnp.zeros_like(x[..., :1]))
        return Features(values, 0.5 * jnp.sum(x * x, axis=-1, keepdims=True))
