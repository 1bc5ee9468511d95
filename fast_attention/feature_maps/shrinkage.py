"""The best curvature and shrinkage of Gaussian features per direction.

Directions are independent. If ``lambda_l`` is the mean square of ``x~_l + y~_l``, the logarithm of
the relative second moment of a feature is the sum of ``h(lambda_l)`` at the best curvature.

Shape letters: D directions, P trial prices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Float

# Squared bias counts this many times as much as variance; chosen on anisotropic Gaussian data and
# a third of the heads of two trained encoders.
BIAS_COST = 2.0

_LARGEST_LOG_PRICE = 20.0
_LARGEST_MOMENT = 80.0
_TRIALS, _ROUNDS = 4, 11
# Halvings of a direction's bracket: few suffice to find a price that can be paid.
_ROUGH, _FINE = 14, 24


def best_curvature(square: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the ``A <= 0`` that minimizes the second moment for a mean square (arXiv:2302.00787).

    ``A = (1 - 2 lambda - sqrt((2 lambda + 1)^2 + 8 lambda)) / 16``.
    """
    root = jnp.sqrt((2 * square + 1) ** 2 + 8 * square)
    # The same number twice: each form is exact where the other one cancels.
    small = -square / (1 - 2 * jnp.minimum(square, 0.5) + root)
    return jnp.where(square < 0.5, small, (1 - 2 * square - root) / 16)


def log_second_moment(square: Array, curvature: Array) -> Array:
    """Returns ``log(1 - 4 A) - log(1 - 8 A) / 2 + lambda / (1 - 8 A)``: ``h`` at the best A."""
    wide = 1 - 8 * curvature
    return jnp.log1p(-4 * curvature) - 0.5 * jnp.log(wide) + square / wide


def weighted_square(sigma: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Mean square of ``x~ + y~`` over pairs, weighted by attention, after rescaling.

    If queries and keys have variance sigma, a key sampled by attention is distributed as ``y | x ~
    N(sigma x, sigma)``. With the best scale of queries relative to keys, the mean square is ``2
    sigma sqrt(1 + sigma^2) + 2 sigma^2``; a plain average would be ``2 sigma``.
    """
    return 2 * sigma * jnp.sqrt(1 + sigma**2) + 2 * sigma**2


def shrinkage(sigma: Float[Array, "*B D"], num_features: int) -> Float[Array, "*B D"]:
    """Returns the factor ``0 <= c <= 1`` by which each direction is shrunk for M features.

    Minimises ``(exp(sum_l h(lambda(c_l sigma_l))) - 1) / M + 2 sum_l (1 - c_l)^2 sigma_l^2``: the
    variance of the estimate, and the squared bias of attending to ``c x . y``. For a given price
    tau of variance each direction is solved separately; the price for M features is found in a few
    rounds, with several trial prices in each. ``c`` goes to 1 as M grows.

    Args:
      sigma: standard deviations of logits per direction, not negative.
      num_features: M.
    """
    sigma = jnp.maximum(sigma, 1e-12)
    log_count = math.log(num_features)

    def kept(log_price: Array, halvings: int) -> Array:
        """Solves every direction for prices ``[*B, P]``, giving ``[*B, P, D]``."""
        price, spread = jnp.exp(log_price)[..., None], sigma[..., None, :]
        shape = jnp.broadcast_shapes(price.shape, spread.shape)

        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            worth = 2 * BIAS_COST * (1 - middle) * spread - price * _slope(middle * spread) > 0
            return jnp.where(worth, middle, low), jnp.where(worth, high, middle)

        bracket = jnp.zeros(shape, sigma.dtype), jnp.ones(shape, sigma.dtype)
        low, high = jax.lax.fori_loop(0, halvings, halve, vary_alike(bracket, sigma))
        return 0.5 * (low + high)

    def narrow(_, bracket):
        low, high = bracket
        step = (high - low) / (_TRIALS + 1)
        number = jnp.arange(1, _TRIALS + 1, dtype=sigma.dtype)
        trials = low + step * number.reshape((1,) * (low.ndim - 1) + (-1,))
        # A higher price leaves less variance to pay for.
        affordable = trials + log_count < moment(kept(trials, _ROUGH))
        low = low + step * jnp.sum(affordable, -1, keepdims=True, dtype=sigma.dtype)
        return low, low + step

    def moment(keep: Array) -> Array:
        square = weighted_square(keep * sigma[..., None, :])
        return log_second_moment(square, best_curvature(square)).sum(-1)

    start = jnp.full((*sigma.shape[:-1], 1), -log_count, sigma.dtype)
    bracket = start, jnp.full_like(start, _LARGEST_LOG_PRICE)
    low, high = jax.lax.fori_loop(0, _ROUNDS, narrow, vary_alike(bracket, sigma))
    # At some price a direction is given up all at once, and often that is the price found: rounding
    # must not decide on which side of it.
    sides = kept(jnp.concatenate([low, high], -1), _FINE)
    bias = jnp.sum((1 - sides) ** 2 * sigma[..., None, :] ** 2, -1)
    cost = jnp.expm1(jnp.minimum(moment(sides), _LARGEST_MOMENT)) / num_features + BIAS_COST * bias
    return jnp.where(cost[..., :1] <= cost[..., 1:], sides[..., 0, :], sides[..., 1, :])


def _slope(sigma: Array) -> Array:
    """Derivative of ``h(lambda(sigma))``; that of the best curvature cancels."""
    root = jnp.sqrt(1 + sigma**2)
    inner = 2 * root + 2 * sigma**2 / root + 4 * sigma
    return inner / (1 - 8 * best_curvature(weighted_square(sigma)))
