"""Positive features with parameters from data, at the cost of plain ones.

All parts of the formula in :mod:`.gaussian_family` that do not depend on the position are folded
into weights in advance: a query costs one product, a key one more with a [D, D] matrix.

Shape letters: B batch, T length, K key/value heads, D head width, R rows drawn, M features.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import widest
from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.base import FeatureMap, Features, Parameters, as_row, project
from fast_attention.feature_maps.gaussian_family import (
    Tuning,
    check_estimator,
    keeps_lengths,
    untuned,
)
from fast_attention.feature_maps.projections import draw_projection, redraw_rows


class TunedParameters(NamedTuple):
    """Random rows, the tuning, and both folded together; all may differ by head.

    Made by :func:`fold`. Features need the last three arrays, the shifts and ``key_norm``; the
    others are kept for drawing new rows for the same tuning.

    Attributes:
      rows: ``[*B, R, D]``, as drawn.
      query_shift: ``[*B, D]``, see :class:`.gaussian_family.Tuning`.
      key_shift: ``[*B, D]``.
      query_norm: ``[*B, D, D]``.
      key_norm: ``[*B, D, D]``.
      stretch: ``[*B, D, D]``.
      log_stretch: ``[*B]``.
      query_weight: ``[*B, R, D]``, ``rows stretch query_norm``.
      key_weight: ``[*B, R, D]``, the same with ``key_norm``.
      bias: ``[*B, R]``, ``sum_l A_l w_l^2 = (|w|^2 - |stretch w|^2) / 4`` of each row w.
    """

    rows: Float[Array, "*B R D"]
    query_shift: Float[Array, "*B D"]
    key_shift: Float[Array, "*B D"]
    query_norm: Float[Array, "*B D D"]
    key_norm: Float[Array, "*B D D"]
    stretch: Float[Array, "*B D D"]
    log_stretch: Float[Array, "*B"]
    query_weight: Float[Array, "*B R D"]
    key_weight: Float[Array, "*B R D"]
    bias: Float[Array, "*B R"]

    @property
    def tuning(self) -> Tuning:
        """The part that does not depend on the random rows."""
        return Tuning(*(getattr(self, name) for name in Tuning._fields))


def fold(rows: Float[Array, "*B R D"], tuning: Tuning) -> TunedParameters:
    """Folds rows and tuning; their leading axes broadcast, from the right."""
    rank = max(rows.ndim, tuning.stretch.ndim)
    dtype = widest(rows.dtype, tuning.stretch.dtype)
    rows_, *matrices = (
        x.reshape((1,) * (rank - x.ndim) + x.shape).astype(dtype)
        for x in (rows, tuning.stretch, tuning.query_norm, tuning.key_norm)
    )
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    long = product(rows_, matrices[0])
    return TunedParameters(
        rows,
        *tuning,
        query_weight=product(long, matrices[1]),
        key_weight=product(long, matrices[2]),
        bias=0.25 * (jnp.sum(rows_**2, axis=-1) - jnp.sum(long**2, axis=-1)),
    )


@dataclasses.dataclass(frozen=True)
class TunedFeatures(FeatureMap):
    """Positive features of the Gaussian family, see :mod:`.gaussian_family`.

    There are no gradients for their parameters, unless these are trained.

    Initial parameters are those of FAVOR+ for all estimators;
    :func:`fast_attention.mechanisms.favor.calibration.calibrate` computes them from data.

    Attributes:
      estimator: a name in :data:`.gaussian_family.TUNED_ESTIMATORS`.
      num_rows: R, rows of the projection.
      projection: its name in :data:`fast_attention.feature_maps.projections.PROJECTIONS`.
      both_signs: use every row and its negative, M = 2 R features for the product of R.
      trained: differentiate with respect to the parameters, see :mod:`.trained`.
    """

    estimator: str
    num_rows: int = 256
    projection: str = "orthogonal"
    both_signs: bool = False
    trained: bool = False

    def __post_init__(self):
        """Raises ValueError for an unknown estimator."""
        check_estimator(self.estimator)

    def init(self, key: Array, head_dim: int) -> TunedParameters:
        """Draws rows ``[R, D]`` and folds them with the parameters of FAVOR+."""
        rows = draw_projection(self.projection, key, self.num_rows, head_dim)
        return fold(rows, untuned(head_dim))

    def redraw(self, key: Array, parameters: TunedParameters) -> TunedParameters:
        """Draws new rows for the same tuning, separately for each of the leading axes."""
        return fold(self.redraw_rows(key, parameters.rows), parameters.tuning)

    def redraw_rows(self, key: Array, rows: Float[Array, "*B R D"]) -> Float[Array, "*B R D"]:
        """Draws new rows to replace others."""
        return redraw_rows(self.projection, key, rows)

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns M."""
        del head_dim
        return parameters.query_weight.shape[-2] * (2 if self.both_signs else 1)

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: TunedParameters,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns M log-features per position; see the class."""
        # Constants of the data, not weights: without this their gradients would be computed.
        p = parameters if self.trained else jax.lax.stop_gradient(parameters)
        own = p.query_shift if is_query else p.key_shift
        centred = x - as_row(own, x)
        log = project(centred, p.query_weight if is_query else p.key_weight)
        common = None
        if exact_scale or not is_query:
            common = self.common(x, p, is_query=is_query, exact_scale=exact_scale)
        rest = as_row(p.bias, x)
        rest = rest if common is None else rest + common
        if not self.both_signs:
            return Features(None, log + rest)
        return Features(None, jnp.concatenate([rest + log, rest - log], axis=-1))

    def common(
        self, x: Array, p: TunedParameters, *, is_query: bool, exact_scale: bool
    ) -> Float[Array, "*B T 1"]:
        """Returns the common part of all log-features of a position; see :meth:`apply`."""
        centred = x - as_row(p.query_shift if is_query else p.key_shift, x)
        # For keys a . (y - b) stands for a . y: the rest is common to all keys.
        tilt = p.key_shift if is_query else p.query_shift
        linear = (x if is_query else centred) * as_row(tilt, x) * x.shape[-1] ** -0.5
        if keeps_lengths(self.estimator):
            square = centred * centred * x.shape[-1] ** -0.5
        else:
            square = project(centred, p.query_norm if is_query else p.key_norm) ** 2
        common = jnp.sum(linear - 0.5 * square, axis=-1, keepdims=True)
        if not exact_scale:
            return common
        count = self.num_features(p, x.shape[-1])
        return common + as_row(0.5 * p.log_stretch[..., None], x) - 0.5 * math.log(count)
