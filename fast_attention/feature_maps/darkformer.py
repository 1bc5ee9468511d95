r"""DARKFormer features: a learned matrix for each head, then FAVOR+.

With the matrix A, ``[D, D]``, initialized as the identity, and rows w of the random projection::

    phi(x) = FAVOR+(A x) = M^(-1/2) exp(w . z - |z|^2 / 2),   z = A x D^(-1/4)

is an unbiased estimate of ``exp(q^T A^T A k / sqrt(D))``, the softmax kernel with another metric
``A^T A`` (the covariance of the rows ``A^T w``). Initially it equals FAVOR+ up to rounding.

Reference: DARKFormer, arXiv:2603.04127.

Shape letters: B batch (key heads), T length, D head width, R rows drawn, M features.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.base import Features, Parameters, project
from fast_attention.feature_maps.learned import LearnedFeatures
from fast_attention.feature_maps.projections import draw_projection, redraw_rows
from fast_attention.feature_maps.softmax import HyperbolicFeatures, PositiveFeatures


class DarkformerParameters(NamedTuple):
    """Random rows and the learned matrix; both may differ by head.

    Attributes:
      rows: ``[*B, R, D]``, random, not learned.
      matrix: A, ``[*B, D, D]``.
    """

    rows: Float[Array, "*B R D"]
    matrix: Float[Array, "*B D D"]


@dataclasses.dataclass(frozen=True)
class DarkformerFeatures(LearnedFeatures):
    """FAVOR+ features of ``A x`` with a learned A, see the module.

    Attributes:
      num_rows: R, rows of the projection.
      projection: its name in :data:`fast_attention.feature_maps.projections.PROJECTIONS`.
      both_signs: use every row and its negative, M = 2 R features for the product of R.
    """

    num_rows: int = 256
    projection: str = "orthogonal"
    both_signs: bool = False

    parameters_type: ClassVar[type[DarkformerParameters]] = DarkformerParameters

    def init(self, key: Array, head_dim: int) -> DarkformerParameters:
        """Draws rows ``[R, D]``, with the identity for A."""
        return self.from_rows(draw_projection(self.projection, key, self.num_rows, head_dim))

    def from_rows(self, rows: Float[Array, "*B R D"]) -> DarkformerParameters:
        """Returns initial parameters with given rows."""
        return DarkformerParameters(rows, jnp.eye(rows.shape[-1], dtype=rows.dtype))

    def redraw(self, key: Array, parameters: DarkformerParameters) -> DarkformerParameters:
        """Draws new rows for the same A, separately for each of the leading axes."""
        return parameters._replace(rows=redraw_rows(self.projection, key, parameters.rows))

    def head_dim(self, parameters: DarkformerParameters) -> int:
        """Returns D."""
        return parameters.rows.shape[-1]

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns M."""
        return self._favor.num_features(parameters.rows, head_dim)

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: DarkformerParameters,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns M log-features per position; see the class."""
        rows = jax.lax.stop_gradient(parameters.rows)
        moved = project(x, parameters.matrix)
        return self._favor.apply(moved, rows, is_query=is_query, exact_scale=exact_scale)

    @property
    def _favor(self) -> PositiveFeatures:
        kind = HyperbolicFeatures if self.both_signs else PositiveFeatures
        return kind(self.num_rows, self.projection)
