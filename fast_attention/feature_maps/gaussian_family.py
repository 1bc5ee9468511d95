r"""The positive Gaussian estimators of ``exp(x . y)``: parameters from moments of the data.

All estimators share one formula: importance sampling of ``E_w exp(w . (x + y))`` with a Gaussian of
another covariance. With shifts a, b, matrices ``P1^T P2 = I``, curvatures ``A_l <= 0``, ``S = 1 - 4
A`` and shrinkage ``0 <= c_l <= 1``::

    x~ = sqrt(c) P1 (x - a),   y~ = sqrt(c) P2 (y - b)
    log phi_Q,m = sum_l A_l w_ml^2 + w_m . (sqrt(S) x~) - |x~|^2 / 2 + b . x - a . b + const
    log phi_K,m = sum_l A_l w_ml^2 + w_m . (sqrt(S) y~) - |y~|^2 / 2 + a . y         + const

and ``E sum_m phi_Q,m phi_K,m = exp(x . y)`` if ``c = 1``, for any a, b, P1, P2 and A. The
relative second moment of a feature is the product over directions of
``(1 - 4 A) (1 - 8 A)^(-1/2) exp(u^2 / (1 - 8 A))`` with ``u = x~ + y~``. The estimators by name:

=========== =============================== ===========================================
favor+      P1 = P2 = I                     A = 0
favor++     P1 = P2 = I                     one A for all directions
saderf      diagonal, of equal mean squares one A
sderf       eigenvectors of E u u^T         one A per direction
aderf       second moments made equal       one A
aderf+      second moments made equal       one A per direction
wderf       as aderf+, rescaled             one A per direction, weighted towards large weights
wderf_s     as wderf of ``sqrt(c) x``       the same, and c < 1: biased towards the uniform average
=========== =============================== ===========================================

Rows are first rotated into the basis of the eigenvectors. This does not change the distribution,
but makes results independent of rounding: signs of eigenvectors, and eigenvectors of equal
eigenvalues, depend on rounding. Therefore ``stretch = U sqrt(S) U^T`` below, and norms with a ``U``
in front.

The first six also with the prefix ``centred_``: a and b are the means (always so for the last two).

References: Choromanski et al., arXiv:2009.14794 (FAVOR+); Likhosherstov et al., arXiv:2205.15317
(FAVOR++) and arXiv:2302.00787 (SADERF, SDERF, ADERF, together FAVOR#). Centring, ADERF+, WDERF and
WDERF-S are this project's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.decompositions import cholesky, eigh, invert_lower, multiply
from fast_attention.feature_maps.moments import Moments
from fast_attention.feature_maps.shrinkage import best_curvature, shrinkage, weighted_square

_UNCENTRED = ("favor+", "favor++", "saderf", "sderf", "aderf", "aderf+")
CENTRED = "centred_"
TUNED_ESTIMATORS: tuple[str, ...] = (
    *_UNCENTRED[1:],
    *(CENTRED + name for name in _UNCENTRED),
    "wderf",
    "wderf_s",
)
"""Names of the estimators with parameters from data."""

# Added to second moments of trace D, so that each has an inverse: this much, and this many rounding
# errors of the largest entries. Fewer positions than D leave a matrix without one, and rounding
# makes it negative in some directions.
RIDGE = 1e-6
RIDGE_ROUNDINGS = 16
# Queries that hardly differ are given this share of the keys' mean square at least, and vice versa.
SMALLEST_SHARE = 1e-6
SMALLEST_SQUARE = 1e-12


class Tuning(NamedTuple):
    """Parameters of the family for unscaled queries and keys, before the scale D^(-1/4).

    Attributes:
      query_shift: a, ``[*B, D]``, on the scale of queries.
      key_shift: b, ``[*B, D]``, on the scale of keys.
      query_norm: ``U sqrt(c) P1 D^(-1/4)``, ``[*B, D, D]``: ``|x~|`` is the norm of this times ``q
        - a``. U is orthogonal, the basis in which A is diagonal.
      key_norm: ``U sqrt(c) P2 D^(-1/4)``, the same for keys.
      stretch: ``U sqrt(1 - 4 A) U^T``, ``[*B, D, D]``, the factor of rows.
      log_stretch: logarithm of its determinant, ``[*B]``.
    """

    query_shift: Float[Array, "*B D"]
    key_shift: Float[Array, "*B D"]
    query_norm: Float[Array, "*B D D"]
    key_norm: Float[Array, "*B D D"]
    stretch: Float[Array, "*B D D"]
    log_stretch: Float[Array, "*B"]


def untuned(head_dim: int) -> Tuning:
    """Returns the parameters of FAVOR+: no shift, identity, no curvature."""
    zero = jnp.zeros(head_dim, jnp.float32)
    eye = jnp.eye(head_dim, dtype=jnp.float32)
    norm = eye * head_dim**-0.25
    return Tuning(zero, zero, norm, norm, eye, jnp.float32(0))


def keeps_lengths(estimator: str) -> bool:
    """Whether P1 and P2 are orthogonal, so that ``|y~| = |y - b|`` needs no product."""
    return estimator.removeprefix(CENTRED) in ("favor+", "favor++", "sderf")


def tune(
    estimator: str, moments: Moments, num_features: int, *, smallest_kept: float = 0.0
) -> Tuning:
    """Returns the parameters for queries and keys with these moments.

    Args:
      estimator: one of :data:`TUNED_ESTIMATORS`.
      moments: of raw queries and keys, leading axes ``[*B]``.
      num_features: M, which determines the shrinkage of "wderf_s".
      smallest_kept: the minimum c of a direction; with 0 matrices may be singular.

    Returns:
      Finite parameters for all moments (also of equal keys, one position or none).
    """
    check_estimator(estimator)
    width = moments.query.mean.shape[-1]
    scale = width**-0.25
    base = estimator.removeprefix(CENTRED)
    if base.startswith("wderf") or base != estimator:
        a, b = moments.query.mean * scale, moments.key.mean * scale
        mean_x, mean_y = jnp.zeros_like(a), jnp.zeros_like(b)
        second_x, second_y = (side.covariance * scale**2 for side in moments)
    else:
        mean_x, mean_y = moments.query.mean * scale, moments.key.mean * scale
        a, b = jnp.zeros_like(mean_x), jnp.zeros_like(mean_y)
        second_x, second_y = (
            (side.covariance + side.mean[..., :, None] * side.mean[..., None, :]) * scale**2
            for side in moments
        )
    p1, p2, curvature, basis = _solve(
        base, second_x, second_y, mean_x, mean_y, num_features, smallest_kept
    )
    root = jnp.sqrt(1 - 4 * curvature)
    return Tuning(
        a / scale,
        b / scale,
        multiply(basis, p1) * scale,
        multiply(basis, p2) * scale,
        multiply(basis * root[..., None, :], basis.mT),
        jnp.log(root).sum(-1),
    )


def check_estimator(estimator: str) -> None:
    """Raises ValueError unless the name is one of :data:`TUNED_ESTIMATORS`."""
    if estimator not in TUNED_ESTIMATORS:
        raise ValueError(
            f"Unknown tuned estimator {estimator!r}; choose one of {', '.join(TUNED_ESTIMATORS)}."
        )


def balance(second_x: Array, second_y: Array) -> tuple[Array, Array, Array, Array]:
    """Makes two second moments equal and diagonal.

    Args:
      second_x: ``[*B, D, D]``, symmetric, not negative.
      second_y: the same.

    Returns:
      ``P1, P2 [*B, D, D]`` with ``P1^T P2 = I``, ``sigma [*B, D]`` with ``P1 second_x P1^T =
      P2 second_y P2^T = diag(sigma)``, up to the ridge, and an orthogonal ``U [*B, D, D]`` such
      that ``U P1`` and ``U P2`` depend smoothly on the moments.
    """
    width = second_x.shape[-1]
    eye = jnp.eye(width, dtype=second_x.dtype)
    square_x, square_y = _mean_squares(second_x, second_y)

    def positive(second: Array, square: Array) -> Array:
        unit = second / square[..., None, None]
        largest = jnp.sqrt(jnp.sum(unit**2, axis=(-2, -1), keepdims=True))
        ridge = RIDGE + RIDGE_ROUNDINGS * jnp.finfo(unit.dtype).eps * largest
        return unit + ridge * jnp.broadcast_to(eye, unit.shape)

    # With L L^T the first and L^T second L = U Sigma^2 U^T, one decomposition gives both matrices.
    root_x = cholesky(positive(second_x, square_x))
    mixed = multiply(positive(second_y, square_y), root_x)
    squares, u = eigh(multiply(root_x.mT, mixed))
    # Rounding leaves nothing of the smallest; any positive number keeps P1^T P2 = I.
    sigma = jnp.sqrt(jnp.maximum(squares, 1e-10 * squares[..., -1:]))
    basis = u.mT
    p1 = jnp.sqrt(sigma)[..., None] * multiply(basis, invert_lower(root_x))
    p2 = multiply(basis, root_x.mT) / jnp.sqrt(sigma)[..., None]
    ratio = (square_y / square_x)[..., None, None] ** 0.25
    return p1 * ratio, p2 / ratio, sigma * jnp.sqrt(square_x * square_y)[..., None], u


def _solve(
    base: str,
    second_x: Array,
    second_y: Array,
    mean_x: Array,
    mean_y: Array,
    num_features: int,
    smallest_kept: float,
) -> tuple[Array, Array, Array, Array]:
    """Returns P1, P2 (times the root of c), A, and the basis of rows."""
    width = second_x.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(width, dtype=second_x.dtype), second_x.shape)
    if base == "favor+":
        return eye, eye, jnp.zeros_like(mean_x), eye
    if base == "favor++":
        square = _diagonal(second_x) + _diagonal(second_y) + 2 * mean_x * mean_y
        return eye, eye, _one_curvature(square), eye
    if base == "saderf":
        square_x, square_y = _diagonal(second_x), _diagonal(second_y)
        floor_x, floor_y = _mean_squares(second_x, second_y)
        x = jnp.maximum(square_x, RIDGE * floor_x[..., None])
        y = jnp.maximum(square_y, RIDGE * floor_y[..., None])
        psi = (y / x) ** 0.25
        square = psi**2 * square_x + square_y / psi**2 + 2 * mean_x * mean_y
        return eye * psi[..., None], eye / psi[..., None], _one_curvature(square), eye
    if base == "sderf":
        cross = mean_x[..., :, None] * mean_y[..., None, :]
        squares, vectors = eigh(second_x + second_y + cross + cross.mT)
        rotation = vectors.mT
        return rotation, rotation, best_curvature(jnp.maximum(squares, 0)), vectors
    p1, p2, sigma, basis = balance(second_x, second_y)
    if base in ("aderf", "aderf+"):
        square = 2 * sigma + 2 * _apply(p1, mean_x) * _apply(p2, mean_y)
        curvature = _one_curvature(square) if base == "aderf" else _curvatures(square)
        return p1, p2, curvature, basis
    keep = jnp.ones_like(sigma)
    if base == "wderf_s":
        keep = jnp.maximum(shrinkage(sigma, num_features), smallest_kept)
    sigma = keep * sigma
    # Of the weight that attention gives, keys lie further out than queries.
    gain = (1 + sigma**2) ** 0.25
    p1 = p1 * (jnp.sqrt(keep) * gain)[..., None]
    p2 = p2 * (jnp.sqrt(keep) / gain)[..., None]
    return p1, p2, best_curvature(weighted_square(sigma)), basis


def _mean_squares(second_x: Array, second_y: Array) -> tuple[Array, Array]:
    """Mean squares ``[*B]`` per direction, with a lower bound on their ratio."""
    x, y = (_diagonal(second).mean(-1) for second in (second_x, second_y))
    floor = jnp.maximum(SMALLEST_SHARE * jnp.maximum(x, y), SMALLEST_SQUARE)
    return jnp.maximum(x, floor), jnp.maximum(y, floor)


def _one_curvature(square: Array) -> Array:
    mean = jnp.maximum(square.mean(-1, keepdims=True), 0)
    return jnp.broadcast_to(best_curvature(mean), square.shape)


def _curvatures(square: Array) -> Array:
    return best_curvature(jnp.maximum(square, 0))


def _diagonal(matrix: Array) -> Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _apply(matrix: Array, vector: Array) -> Array:
    return multiply(matrix, vector[..., None])[..., 0]
