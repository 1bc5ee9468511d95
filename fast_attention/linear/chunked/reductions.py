"""Reductions of a few rows, as in decoding.

XLA on CPU reduces along the last axis element by element unless there are many rows to do at once.
Adding or comparing halves of the row is the same reduction as a few vector operations.

Shape letters: M features.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float

# As many rows as this are reduced at once by what XLA does itself.
MANY_ROWS = 8


def row_max(x: Float[Array, "*B R M"]) -> Float[Array, "*B R"]:
    """Returns the largest entry of each row."""
    return x.max(axis=-1) if x.shape[-2] >= MANY_ROWS else _halve(jnp.maximum, x).max(axis=-1)


def row_sum(x: Float[Array, "*B R M"]) -> Float[Array, "*B R"]:
    """Returns the sum of each row."""
    return x.sum(axis=-1) if x.shape[-2] >= MANY_ROWS else _halve(jnp.add, x).sum(axis=-1)


def _halve(combine: Callable[[Array, Array], Array], x: Array) -> Array:
    while x.shape[-1] > 8 and x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = combine(x[..., :half], x[..., half:])
    return x
