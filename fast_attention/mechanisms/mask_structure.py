"""Whether a mask ``[T, S]`` only hides keys, the same for every query.

Such a mask has rows that are alike: each shows the same keys, or none (a padded query). A mask for
causal attention may also have rows that show those of the same keys that are not later.

The check reads the mask once, as ``visible.any(axis=-2)`` would: the last row that shows anything
holds all keys, and the other rows are compared with it. A compiled program does so in blocks of
rows, because XLA's CPU compiler stores the intermediate bytes of a reduction along the last axis.

Shape letters: T queries, S keys.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.core import Tracer

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool

ROWS = 256
"""Rows of a block."""

SEARCHED_ROWS = 64
"""Rows that are searched at once for the last one that shows a key."""

LANES = 64
"""Keys that are combined side by side: such reductions are vectorised, others are not."""

STRIPS = 4
"""Strips of rows under the diagonal, each as wide as its last row."""


def common_keys(visible: Any, *, causal: bool) -> tuple[Any, Any]:
    """Finds the keys that all rows show, and whether they do.

    Args:
      visible: bool ``[..., T, S]``, concrete or traced.
      causal: rows may also show only the keys of their past (if T = S).

    Returns:
      The keys, bool ``[..., S]``, and whether all rows are as they should be, bool ``[...]``.
    """
    rows, columns = visible.shape[-2:]
    causal = causal and rows == columns
    traced = isinstance(visible, Tracer)
    known = not any(export.is_symbolic_dim(n) for n in visible.shape)
    if traced and known and min(rows, columns) >= 2 * ROWS:
        keys = _last_shown(visible)
        return keys, _rows_fit_in_blocks(visible, keys, causal)
    xp: Any = jnp if traced else np
    shown = visible.any(axis=-1)
    keys = _last(xp, visible, shown)[0]
    expected = keys[..., None, :]
    fits = ~shown | (visible == expected).all(axis=-1)
    if causal:
        rank = visible.ndim
        past = _places(xp, columns, rank, -1) <= _places(xp, rows, rank, -2)
        fits = fits | (visible == (expected & past)).all(axis=-1)
    return keys, fits.all(axis=-1)


def _places(xp: Any, length: int, rank: int, axis: int) -> Any:
    """Returns 0, 1 ... along an axis; the other axes are 1."""
    return xp.arange(length).reshape([length if n == rank + axis else 1 for n in range(rank)])


def _last(xp: Any, visible: Any, shown: Any) -> tuple[Any, Any]:
    """Returns the last row that shows a key, ``[..., S]``, and whether there is one, ``[...]``."""
    rows = shown.shape[-1]
    place = xp.where(shown, _places(xp, rows, shown.ndim, -1), -1)
    last = place.max(axis=-1, keepdims=True)
    row = (visible & ((place == last) & shown)[..., None]).any(axis=-2)
    return row, last[..., 0] >= 0


def _last_shown(visible: Bool[Array, "*X T S"]) -> Bool[Array, "*X S"]:
    """Returns the last row that shows a key; searches from the end, so mostly reads one block."""
    *leading, rows, columns = visible.shape

    def search(carry: Any) -> Any:
        start, found, keys = carry
        start = jnp.maximum(start - SEARCHED_ROWS, 0)
        block = lax.dynamic_slice_in_dim(visible, start, SEARCHED_ROWS, axis=-2)
        row, here = _last(jnp, block, block.any(axis=-1))
        return start, found | here, jnp.where(found[..., None], keys, row)

    nothing = vary_alike((jnp.zeros(leading, bool), jnp.zeros((*leading, columns), bool)), visible)
    carry = (jnp.int32(rows), *nothing)
    return lax.while_loop(lambda c: (c[0] > 0) & ~c[1].all(), search, carry)[2]


def _rows_fit_in_blocks(
    visible: Bool[Array, "*X T S"], keys: Bool[Array, "*X S"], causal: bool
) -> Bool[Array, "*X"]:
    *leading, rows, columns = visible.shape
    rank = visible.ndim
    expected = keys[..., None, :]
    blocks = -(-rows // ROWS)
    per_strip = -(-blocks // STRIPS) if causal else blocks
    fits = vary_alike(jnp.ones(leading, bool), visible, keys)
    for first in range(0, blocks, per_strip):
        stop = min(first + per_strip, blocks)
        # The last block is moved up to end with the last row: rows may be compared twice.
        left = min(first * ROWS, rows - ROWS) if causal else columns
        right = min(stop * ROWS, columns) if causal else columns

        def compare(n: Array, fits: Array, left: int = left, right: int = right) -> Array:
            start = jnp.minimum(n * ROWS, rows - ROWS)
            block = lax.dynamic_slice_in_dim(visible, start, ROWS, axis=-2)
            shown, differs = _compare(block[..., :left], expected[..., :left])
            if left == right:
                return fits & ~(shown & differs).any(axis=-1)
            later_shown, later_differs = _compare(block[..., right:], expected[..., right:])
            block, keys = block[..., left:right], expected[..., left:right]
            column = _places(jnp, right - left, rank, -1) + left
            past = column <= start + _places(jnp, ROWS, rank, -2)
            here_shown, here_differs = _compare(block, keys)
            _, differs_from_past = _compare(block, keys & past)
            causal_row = ~(differs | differs_from_past | later_shown)
            same_row = ~(differs | here_differs | later_differs)
            empty = ~(shown | here_shown | later_shown)
            return fits & (empty | same_row | causal_row).all(axis=-1)

        fits = lax.fori_loop(first, stop, compare, fits)
    return fits


def _compare(block: Array, expected: Array) -> tuple[Array, Array]:
    """Returns whether rows ``[..., R, S]`` show anything, and differ from the expected ones."""
    bits = block.astype(np.uint8) | ((block ^ expected).astype(np.uint8) << 1)
    whole = bits.shape[-1] // LANES * LANES
    groups = bits[..., :whole].reshape(*bits.shape[:-1], whole // LANES, LANES)
    # Unless it is kept apart, the reduction over groups is merged with that over lanes.
    lanes = lax.optimization_barrier(_any_bits(groups, axis=-2))
    found = _any_bits(lanes, axis=-1) | _any_bits(bits[..., whole:], axis=-1)
    return (found & 1) != 0, (found & 2) != 0


def _any_bits(x: Array, axis: int) -> Array:
    return lax.reduce(x, np.uint8(0), lax.bitwise_or, (x.ndim + axis,))
