"""The interface of feature maps: queries and keys to features, before exponentiation.

Shape letters: B batch, T length, H heads, D head width, M features.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float

Parameters = Any
"""Pytree of the arrays of a map: shared, or with leading (batch and) head axes."""

LogKind = Literal["feature", "position", "none"]


class Features(NamedTuple):
    """Features ``values * exp(log)``, kept separate until a maximum is subtracted.

    Attributes:
      values: ``[..., T, M]``, or None for all ones (an exponential map).
      log: ``[..., T, M]`` (one exponent per feature), ``[..., T, 1]`` (one per position), or
        None (the values are the features).
    """

    values: Float[Array, "*B T M"] | None
    log: Float[Array, "*B T N"] | None

    def shift(self, amount: Array | None) -> Float[Array, "*B T M"]:
        """Returns the features multiplied by ``exp(amount)``; None means 0."""
        if self.log is None:
            assert self.values is not None
            return self.values if amount is None else self.values * jnp.exp(amount)
        scale = jnp.exp(self.log if amount is None else self.log + amount)
        return scale if self.values is None else self.values * scale

    def pull_back(self, amount: Array | None, shifted: Array, cotangent: Array) -> Features:
        """Returns the cotangents of ``values`` and ``log``, given that of ``shift(amount)``."""
        if self.log is None:
            return Features(cotangent if amount is None else cotangent * jnp.exp(amount), None)
        if self.values is None:
            return Features(None, _product(shifted, cotangent))
        scale = jnp.exp(self.log if amount is None else self.log + amount)
        d_log = _product(shifted, cotangent)
        if self.log.shape[-1] == 1:
            d_log = d_log.sum(-1, keepdims=True)
        return Features(cotangent * scale, d_log)


def _product(shifted: Array, cotangent: Array) -> Array:
    # A feature that underflowed has no gradient, also where its cotangent overflowed.
    return jnp.where(shifted == 0, 0, shifted * cotangent)


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """A feature map ``phi`` with ``phi(q) . phi(k)`` close to (or defining) a kernel of q and k.

    A map consists of its options (this frozen, hashable dataclass, static under jit) and a pytree
    of parameters, which is passed to every call. So parameters can be shared, differ by head, be
    learned or be redrawn. Maps take ``[..., T, D]`` arrays and are called for one chunk of the
    sequence at a time, forward and backward; so a map must treat every position independently.

    Class attributes:
      log_kind: shape of ``Features.log``: "feature" ``[..., T, M]``, "position"
        ``[..., T, 1]`` or "none".
      signed: True if features can be negative. Denominators of a signed map can vanish.
    """

    log_kind: ClassVar[LogKind] = "feature"
    signed: ClassVar[bool] = False

    def init(self, key: Array, head_dim: int) -> Parameters:
        """Draws parameters for queries and keys of width ``head_dim``."""
        raise NotImplementedError

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns M for these parameters."""
        raise NotImplementedError

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: Parameters,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Computes features of ``x``.

        Args:
          x: queries or keys, ``[..., T, D]``, float32 or float64.
          parameters: as from :meth:`init`.
          is_query: queries and keys may have different features.
          exact_scale: if False, factors common to all features of one query, or to all keys, may be
            omitted, because they cancel in normalised attention. If True, features are complete.

        Returns:
          :class:`Features` in the dtype of ``x``.
        """
        raise NotImplementedError


def project(x: Float[Array, "*B T D"], projection: Array) -> Float[Array, "*B T M"]:
    """Returns ``x @ projection^T`` at the highest precision, because it is an exponent.

    ``projection`` is ``[M, D]``, or has leading head (and batch) axes, ``[H, M, D]``.
    """
    return jnp.matmul(
        x, projection.astype(x.dtype).swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST
    )


def as_row(vector: Float[Array, "*B N"], x: Float[Array, "*B T D"]) -> Float[Array, "*B 1 N"]:
    """Reshapes ``[*B, N]`` to ``[*1, *B, 1, N]`` with as many axes as ``x``, in its dtype."""
    row = vector[..., None, :].astype(x.dtype)
    return row.reshape((1,) * (x.ndim - row.ndim) + row.shape)
