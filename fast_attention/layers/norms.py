"""Norms before or after a residual part, by name, and a gain with a small initial value.

Shape letters: B batch and length, M features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float

NORMS = ("layer", "scale", "rms", "none")
"""Kinds of norms of `make_norm`."""


def make_norm(
    kind: str,
    features: int,
    *,
    epsilon: float = 1e-5,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> Callable[[Array], Array]:
    """Makes a norm over the last axis.

    Args:
      kind: "layer" (`nnx.LayerNorm`), "scale" (`ScaleNorm`), "rms" (`nnx.RMSNorm`) or "none" (the
        identity).
      features: M.
      epsilon: Added to the variance or mean square; for "scale" the minimum norm to divide by.
      dtype: To compute in; None is that of inputs and parameters.
      rngs: Source of the parameters.

    Returns:
      ``[*B, M] -> [*B, M]``, a module except for "none".

    Raises:
      ValueError: For an unknown kind.
    """
    if kind == "layer":
        return nnx.LayerNorm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)
    if kind == "scale":
        return ScaleNorm(epsilon=epsilon, dtype=dtype)
    if kind == "rms":
        return nnx.RMSNorm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)
    if kind == "none":
        return nnx.identity
    raise ValueError(f"kind must be one of {list(NORMS)}, got {kind!r}.")


class ScaleNorm(nnx.Module):
    """``g x / max(|x|, epsilon)``: vectors of one learned norm.

    Attributes:
      scale: The parameter g, a scalar.

    References:
      Nguyen and Salazar. Transformers without tears. arXiv:1910.05895.
    """

    def __init__(self, *, epsilon: float = 1e-5, dtype: Any = None):
        """Initializes g = 1.

        Args:
          epsilon: The minimum norm to divide by.
          dtype: Dtype of the result; None is that of inputs and parameter.
        """
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """Scales each vector ``[M]``; its norm is computed in at least float32."""
        scale = self.scale[...]
        dtype = jnp.promote_types(x.dtype, scale.dtype) if self.dtype is None else self.dtype
        working = x.astype(at_least_float32(x.dtype))
        # The maximum is taken of squares, so that the root has a finite slope at zero vectors.
        square = jnp.sum(jnp.square(working), axis=-1, keepdims=True)
        length = jnp.sqrt(jnp.maximum(square, self.epsilon**2))
        return (scale * (working / length)).astype(dtype)


class ReZero(nnx.Module):
    """``gain x``: a residual part with a small initial contribution, instead of a norm.

    Attributes:
      gain: The parameter, a scalar.

    References:
      Bachlechner et al. ReZero is all you need. arXiv:2003.04887.
    """

    def __init__(self, initial: float = 0.0):
        """Initializes the gain as `initial`."""
        self.gain = nnx.Param(jnp.asarray(initial, jnp.float32))

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns the product in the dtype of `x`."""
        return (self.gain[...] * x).astype(x.dtype)
