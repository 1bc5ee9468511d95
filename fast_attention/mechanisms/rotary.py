"""Rotary positions.

Shape letters: B batch, H heads, D head width.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Float, Int


@runs_on_auto_axes
def rotate(
    x: Float[Array, "*B H D"],
    positions: Int[Array, "*B"],
    base: float = 10000.0,
    *,
    interleaved: bool = False,
) -> Float[Array, "*B H D"]:
    """Rotates queries or keys by their positions, so that products depend on distances only.

    The pair of features i and i + D/2 is rotated by the angle ``t / base^(2i / D)``.

    Args:
      x: ``[*B, H, D]`` with D even.
      positions: ``[*B]`` integers.
      base: Ratio of the longest to the shortest wavelength.
      interleaved: Rotate the pair of features 2i and 2i + 1 instead. Both conventions are in use;
        parameters trained with one cannot be used with the other.

    Returns:
      ``[*B, H, D]`` in the dtype of `x`, rounded once: products and sums are in at least float32.

    Raises:
      ValueError: If D is odd.

    References:
      Su et al. RoFormer. arXiv:2104.09864.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"Rotary positions rotate pairs of features: D must be even, got {width}.")
    angles = angles_of(positions, np.arange(0, width, 2) / width, base)[..., None, :]
    wide = x.astype(at_least_float32(x.dtype))
    cos, sin = jnp.cos(angles).astype(wide.dtype), jnp.sin(angles).astype(wide.dtype)
    if interleaved:
        left, right = wide[..., ::2], wide[..., 1::2]
    else:
        left, right = jnp.split(wide, 2, axis=-1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    if interleaved:
        return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def angles_of(
    positions: Int[Array, "*B"], exponents: np.ndarray, base: float = 10000.0
) -> Float[Array, "*B F"]:
    """Returns float32 angles ``positions / base^exponents``, for each of F exponents."""
    frequencies = jnp.asarray(base**-exponents, jnp.float32)
    frequencies = frequencies.reshape((1,) * positions.ndim + (-1,))
    return positions[..., None].astype(jnp.float32) * frequencies
