"""How a model learns where a token is: sinusoids, a learned table, or rotation.

Shape letters: B batch, T length, H heads, D head width, M features, L maximum length.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from fast_attention.array_types import Array, Float, Int


def sinusoids(positions: Int[Array, "*B"], features: int) -> Float[Array, "*B M"]:
    """Encodes positions by sines and cosines of geometrically spaced frequencies.

    Feature 2i is ``sin(t / 10000^(2i / M))``, feature 2i + 1 the cosine of the same angle.

    Args:
      positions: ``[*B]`` integers.
      features: M.

    Returns:
      float32 ``[*B, M]``.

    References:
      Vaswani et al. Attention is all you need. arXiv:1706.03762, section 3.5.
    """
    angles = _angles(positions, np.arange(0, features, 2) / features)
    encoded = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return encoded.reshape(*positions.shape, -1)[..., :features]


def rotate(
    x: Float[Array, "*B H D"], positions: Int[Array, "*B"], base: float = 10000.0
) -> Float[Array, "*B H D"]:
    """Rotates queries or keys by their positions, so that products depend on distances alone.

    The pair of features i and i + D/2 is turned by the angle ``t / base^(2i / D)``.

    Args:
      x: ``[*B, H, D]`` with D even.
      positions: ``[*B]`` integers.
      base: Ratio of the longest to the shortest wavelength.

    Returns:
      ``[*B, H, D]`` in the type of `x`.

    Raises:
      ValueError: If D is odd.

    References:
      Su et al. RoFormer. arXiv:2104.09864.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"Rotary positions turn pairs of features: D must be even, got {width}.")
    angles = _angles(positions, np.arange(0, width, 2) / width, base)[..., None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _angles(positions: Array, exponents: np.ndarray, base: float = 10000.0) -> Array:
    frequencies = jnp.asarray(base**-exponents, jnp.float32)
    frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    return positions[..., None].astype(jnp.float32) * frequencies


class LearnedPositions(nnx.Module):
    """A learned vector for every position, at first the sinusoids of `sinusoids`.

    Attributes:
      table: Parameter ``[L, M]``.
    """

    def __init__(self, max_len: int, features: int):
        """Fills the table.

        Args:
          max_len: L.
          features: M.
        """
        self.table = nnx.Param(sinusoids(jnp.arange(max_len), features))

    def __call__(self, positions: Int[Array, "*B"]) -> Float[Array, "*B M"]:
        """Looks positions up.

        Args:
          positions: ``[*B]``, in ``0 .. L - 1``.

        Returns:
          ``[*B, M]``; NaN at positions out of range that are only known when the program runs.

        Raises:
          ValueError: At positions out of range.
        """
        table = self.table[...]
        if not isinstance(positions, Tracer):
            known = np.asarray(positions)  # Under jit, jax would make even a constant unknown.
            low, high = known.min(initial=0), known.max(initial=0)
            if low < 0 or high >= len(table):
                raise ValueError(
                    f"Positions {low} to {high} are not all in the learned table of max_len="
                    f"{len(table)}: use shorter inputs, a larger max_len, or positions without a "
                    "table ('rotary', 'sinusoidal')."
                )
        index = jnp.asarray(positions, jnp.int32)
        index = jnp.where(index < 0, len(table), index)  # Negative ones would count from the end.
        return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)
