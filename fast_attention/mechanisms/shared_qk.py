"""What attention has in common where queries and keys are the same vectors (Reformer).

A position's key is its query at unit length. The logit of a position with itself, which would
nearly always be the largest, is replaced by a constant so low that a position attends to itself
only where it sees nothing else (arXiv:2001.04451).

Shape letters: B batch, D head width.
"""

from __future__ import annotations

import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float

SELF_LOGIT = -5e4
"""Logit of a position with itself; half precision can hold it."""


def unit_keys(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Scales vectors to unit length; those shorter than 1e-12 become zeros, with zero gradient.

    Args:
      x: ``[*B, D]``.

    Returns:
      ``[*B, D]`` in the type of `x`, computed in float32 at least.
    """
    wide = x.astype(at_least_float32(x.dtype))
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
    # The inner where keeps the infinite slope of the root at 0 out of the gradient.
    long = squares > 1e-24
    inverse = jnp.where(long, jnp.where(long, squares, 1) ** -0.5, 0)
    return (wide * inverse).astype(x.dtype)
