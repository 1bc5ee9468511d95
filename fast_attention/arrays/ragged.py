"""Prompts of unequal lengths on one grid: every token at its own place, padding nowhere.

Shape letters: B batch, T tokens given, L places of the grid.
"""

from __future__ import annotations

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Int


def places(taken: Int[Array, "*B"], visible: Bool[Array, "*B T"]) -> Int[Array, "*B T"]:
    """Returns the place of every token: after those taken, in order, padding not counted."""
    before = jnp.cumsum(visible, axis=-1, dtype=taken.dtype) - visible.astype(taken.dtype)
    return taken[..., None] + before


def to_grid(x: Array, place: Array, visible: Array, length: int) -> Array:
    """Puts ``[*B, T, ...]`` into zeros ``[*B, L, ...]``; what is not visible goes nowhere."""
    axis = place.ndim - 1
    flat = x.reshape(-1, *x.shape[axis:])
    index = jnp.where(visible, place, length).reshape(-1, x.shape[axis])
    grid = jnp.zeros((len(flat), length, *flat.shape[2:]), x.dtype)
    grid = grid.at[jnp.arange(len(flat))[:, None], index].set(flat, mode="drop")
    return grid.reshape(*x.shape[:axis], *grid.shape[1:])


def from_grid(x: Array, place: Array) -> Array:
    """Takes ``[*B, T, ...]`` from a grid ``[*B, L, ...]``; unspecified where nothing was put."""
    axis = place.ndim - 1
    index = jnp.minimum(place, x.shape[axis] - 1)
    index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index, axis=axis)
