r"""Trainable parameters of the positive Gaussian family, valid for all values.

The formula is that of :mod:`.gaussian_family` with ``w`` replaced by ``F^T w``: for any matrices N
and F that have an inverse, and any a and b,

    log phi_Q,m = (|w|^2 - |F^T w|^2) / 4 + (F^T w) . x~ - |x~|^2 / 2 + b . x - a . b + const
    x~ = N (x - a),   y~ = C N^(-T) (y - b)

has ``E sum_m phi_Q,m phi_K,m = exp(x . y)`` if ``C = I``. The second moment of a feature is finite
if ``F^T F > I / 2``. So the parameters are triangular matrices with logarithmic diagonals, and

    N = U(norm),   F^T F = (I + U(spread)^T U(spread)) / 2,   C = U(keep)^T U(keep)

with F triangular, too: all values are valid, and zeros give FAVOR+. Up to rotations of the rows,
this is the whole family (also ADERF+ and WDERF), without redundancy. With ``keep`` ("wderf_s") the
estimated kernel is ``exp((x - a)^T N^T C N^(-T) (y - b) + ..)``, which differs from softmax: it is
shrunk if C is less than I, and may also be enlarged.

Shape letters: B batch (key heads), D head width, R rows drawn, N = D (D + 1) / 2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.decompositions import cholesky, invert_lower, multiply, qr
from fast_attention.feature_maps.gaussian_family import Tuning
from fast_attention.feature_maps.tuned import TunedParameters, fold

TRAINABLE_ESTIMATORS = ("wderf", "wderf_s")
"""Names of the estimators with trainable parameters: unbiased, and with C."""


SMALLEST_KEPT = 1e-4
"""Minimum c of each direction at the start of training: singular matrices cannot be trained."""


class TrainedParameters(NamedTuple):
    """Random rows and unconstrained parameters; all may differ by head.

    Off-diagonal entries are in units of ``D^(-1/2)``, so that equal steps in all of them change a
    matrix equally at every width.

    Attributes:
      rows: ``[*B, R, D]``, random, not trained.
      query_shift: a, ``[*B, D]``, on the scale of queries.
      key_shift: b, ``[*B, D]``, on the scale of keys.
      norm: upper triangle of N, ``[*B, N]``.
      spread: upper triangle of the root of ``2 F^T F - I``, ``[*B, N]``.
      keep: upper triangle of the root of C, ``[*B, N]``; None is ``C = I``.
    """

    rows: Float[Array, "*B R D"]
    query_shift: Float[Array, "*B D"]
    key_shift: Float[Array, "*B D"]
    norm: Float[Array, "*B N"]
    spread: Float[Array, "*B N"]
    keep: Float[Array, "*B N"] | None


def fold_trained(parameters: TrainedParameters) -> TunedParameters:
    """Returns the parameters used by the features; differentiable, except for the rows."""
    width = parameters.query_shift.shape[-1]
    norm = _triangle(parameters.norm, width)
    spread = _triangle(parameters.spread, width)
    eye = _eye_like(norm)
    root = cholesky(0.5 * (eye + multiply(spread.mT, spread)))
    inverse = invert_lower(norm.mT)
    if parameters.keep is not None:
        keep = _triangle(parameters.keep, width)
        inverse = multiply(keep.mT, multiply(keep, inverse))
    scale = width**-0.25
    tuning = Tuning(
        parameters.query_shift,
        parameters.key_shift,
        query_norm=norm * scale,
        key_norm=inverse * scale,
        stretch=root.mT,
        log_stretch=jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1),
    )
    return fold(jax.lax.stop_gradient(parameters.rows), tuning)


def begin_training(
    rows: Float[Array, "*B R D"], tuning: Tuning, estimator: str
) -> TrainedParameters:
    """Returns the initial trainable parameters for a tuning.

    Features with the same rows differ by a rotation of the rows, but have the same distribution.
    The shrinkage of a tuning is kept for "wderf_s" only.

    Args:
      rows: ``[*B, R, D]``.
      tuning: From :func:`.gaussian_family.tune` with `SMALLEST_KEPT`, or `untuned`, of leading
        axes ``[*B]``.
      estimator: One of `TRAINABLE_ESTIMATORS`.
    """
    width = tuning.query_shift.shape[-1]
    query_norm, key_norm = (x * width**0.25 for x in (tuning.query_norm, tuning.key_norm))
    turn, norm = qr(query_norm)
    eye = _eye_like(norm)
    stretch = multiply(tuning.stretch, turn)
    spread = 2 * multiply(stretch.mT, stretch) - eye
    keep = None
    if estimator == "wderf_s":
        kept = multiply(turn.mT, multiply(key_norm, norm.mT))
        keep = _pack(_root(0.5 * (kept + kept.mT)))
    return TrainedParameters(
        rows,
        tuning.query_shift,
        tuning.key_shift,
        norm=_pack(norm),
        spread=_pack(_root(spread)),
        keep=keep,
    )


def _root(square: Array) -> Array:
    """The upper triangle U with ``U^T U`` equal to a matrix."""
    return cholesky(square).mT


def _triangle(packed: Array, width: int) -> Array:
    """Makes ``[*B, D, D]`` of ``[*B, N]``."""
    rows, columns = np.triu_indices(width)
    diagonal = np.broadcast_to(rows == columns, packed.shape)
    entries = jnp.where(diagonal, jnp.exp(packed), packed * width**-0.5)
    empty = jnp.zeros((*packed.shape[:-1], width, width), packed.dtype)
    return empty.at[..., rows, columns].set(entries)


def _pack(triangle: Array) -> Array:
    width = triangle.shape[-1]
    rows, columns = np.triu_indices(width)
    entries = triangle[..., rows, columns]
    diagonal = np.broadcast_to(rows == columns, entries.shape)
    logarithm = jnp.log(jnp.where(diagonal, entries, 1))
    return jnp.where(diagonal, logarithm, entries * width**0.5)


def _eye_like(matrix: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
