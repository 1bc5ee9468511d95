"""Queries and keys of one norm per head, learned as the temperature of attention.

Shape letters: B batch, T length, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes

TEMPERATURE = 1.0
"""Initial value for every head: logits are between -1 and 1."""


class UnitQueryKey(nnx.Module):
    """Scales every query and key to the squared norm ``sqrt(D) tau``, one tau per key head.

    Logits ``q . k / sqrt(D)`` are then ``tau cos(q, k)``. For the softmax kernel ``exp(x . y)``,
    with ``x = q D^(-1/4)`` and ``y = k D^(-1/4)``, this means ``|x|^2 = |y|^2 = tau``, so ``|x +
    y|^2 <= 4 tau``. Then M positive features (FAVOR+) estimate every weight with a relative
    variance of at most ``(exp(4 tau) - 1) / M``: initially 54 / M. Query heads that share a key
    head share its temperature. A zero vector stays zero.

    References:
      Henry et al., "Query-Key Normalization for Transformers", arXiv:2010.04245 (one temperature
      for all heads); arXiv:2009.14794, lemma 2 (the variance).

    Attributes:
      log_temperature: ``log tau``, ``[K]``; so tau is always positive.
    """

    def __init__(self, num_kv_heads: int):
        """Creates one temperature per head.

        Args:
          num_kv_heads: K.
        """
        self.log_temperature = nnx.Param(jnp.full(num_kv_heads, math.log(TEMPERATURE)))

    @modules_run_on_auto_axes
    def __call__(self, x: Float[Array, "*B H D"]) -> Float[Array, "*B H D"]:
        """Scales queries or keys of H heads, a multiple of K, in at least float32."""
        heads, width = x.shape[-2:]
        log = self.log_temperature[...]
        compute = at_least_float32(x.dtype)
        # exp(log / 2) D^(1/4), for the query heads of each key head.
        length = jnp.repeat(jnp.exp(0.5 * log.astype(compute)), heads // len(log)) * width**0.25
        wide = x.astype(compute)
        # Squares of large half-precision numbers, or of tiny ones, stay in range.
        largest = lax.stop_gradient(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))
        wide = wide / jnp.where(largest == 0, 1, largest)
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        wide = wide / jnp.sqrt(jnp.where(square == 0, 1, square))
        length = length.reshape((1,) * (x.ndim - 2) + (heads, 1))
        return (wide * length).astype(x.dtype)
