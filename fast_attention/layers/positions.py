"""Positional encodings that are added: sinusoids, or learned tables.

Shape letters: B batch, T length, M features, L maximum length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from fast_attention.arrays.types import Array, Float, Int
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.mechanisms.rotary import angles_of


def sinusoids(
    positions: Int[Array, "*B"], features: int, *, concatenated: bool = False
) -> Float[Array, "*B M"]:
    """Encodes positions by sines and cosines of geometrically spaced frequencies.

    Feature 2i is ``sin(t / 10000^(2i / M))``, feature 2i + 1 the cosine of the same angle.

    Args:
      positions: ``[*B]`` integers.
      features: M.
      concatenated: All sines first, then all cosines.

    Returns:
      float32 ``[*B, M]``.

    References:
      Vaswani et al. Attention is all you need. arXiv:1706.03762, section 3.5.
    """
    angles = angles_of(positions, np.arange(0, features, 2) / features)
    waves = jnp.sin(angles), jnp.cos(angles)
    if concatenated:
        return jnp.concatenate(waves, axis=-1)[..., :features]
    return jax.lax.collapse(jnp.stack(waves, axis=-1), -2)[..., :features]


class LearnedPositions(nnx.Module):
    """A learned vector for every position, initialized as `sinusoids`.

    Attributes:
      table: Parameter ``[L, M]``.
    """

    def __init__(
        self,
        max_len: int,
        features: int,
        *,
        initializer: nnx.Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Fills the table.

        Args:
          max_len: L.
          features: M.
          initializer: Initializer of the table instead of sinusoids, e.g.
            ``nnx.initializers.normal()``.
          rngs: Random streams of the initializer.

        Raises:
          ValueError: For an initializer without `rngs`.
        """
        if initializer is None:
            self.table = nnx.Param(sinusoids(jnp.arange(max_len), features))
            return
        if rngs is None:
            raise ValueError("An initializer of positions needs rngs, got None.")
        self.table = nnx.Param(initializer(rngs.params(), (max_len, features), jnp.float32))

    @modules_run_on_auto_axes
    def __call__(self, positions: Int[Array, "*B"]) -> Float[Array, "*B M"]:
        """Looks positions up.

        Args:
          positions: ``[*B]``, in ``0 .. L - 1``.

        Returns:
          ``[*B, M]``; NaN at positions out of range, if these are only known when the program runs.

        Raises:
          ValueError: For positions out of range.
        """
        table = self.table[...]
        _check_range(positions, len(table), f"the learned table of max_len={len(table)}")
        index = jnp.asarray(positions, jnp.int32)
        index = jnp.where(index < 0, len(table), index)  # Negative ones would count from the end.
        return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)


class AxialPositions(nnx.Module):
    """Positions on a grid, with one short learned table for each of its axes.

    Position t is the point ``(t // n_2, t % n_2)`` of a grid ``(n_1, n_2)``, and so on for more
    axes (row-major). Its vector is the sum of one row of each table, or with `axis_features` their
    concatenation.

    Attributes:
      tables: Parameters, one ``[n_i, M]`` per axis, or ``[n_i, M_i]`` with `axis_features`.

    References:
      Ho et al. Axial attention in multidimensional Transformers. arXiv:1912.12180; Kitaev et al.
      Reformer. arXiv:2001.04451 (concatenated).
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int,
        *,
        axis_features: Sequence[int] | None = None,
        rngs: nnx.Rngs,
    ):
        """Draws the tables from the standard normal distribution.

        Args:
          shape: Shape of the grid; the product is the maximum number of positions.
          features: M.
          axis_features: Widths of the tables for concatenation, with sum M; None adds them.
          rngs: Source of the parameters.

        Raises:
          ValueError: If the widths are not one per axis or do not add up to M.
        """
        shape = tuple(shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must be a grid such as (64, 64), got {shape}.")
        if axis_features is not None and (
            len(axis_features) != len(shape) or sum(axis_features) != features
        ):
            raise ValueError(
                f"axis_features must be one width per axis of {shape} and add up to features="
                f"{features}, got {tuple(axis_features)}."
            )
        self.shape = shape
        self.concatenated = axis_features is not None
        widths = axis_features or (features,) * len(shape)
        draw = nnx.initializers.normal(1.0)
        self.tables = nnx.List(
            nnx.Param(draw(rngs.params(), (n, width), jnp.float32))
            for n, width in zip(shape, widths, strict=True)
        )

    @modules_run_on_auto_axes
    def __call__(self, positions: Int[Array, "*B"]) -> Float[Array, "*B M"]:
        """Looks positions up, like `LearnedPositions`, on the grid instead of a table."""
        count = math.prod(self.shape)
        _check_range(positions, count, f"the {count} positions of the grid {self.shape}")
        index = jnp.asarray(positions, jnp.int32)
        inside = (index >= 0) & (index < count)
        places = jnp.unravel_index(jnp.where(inside, index, 0), self.shape)
        rows = [table[...][place] for table, place in zip(self.tables, places, strict=True)]
        out = jnp.concatenate(rows, axis=-1) if self.concatenated else sum(rows[1:], rows[0])
        return jnp.where(inside[..., None], out, jnp.nan)


def _check_range(positions: Array, count: int, where: str) -> None:
    if isinstance(positions, Tracer):
        return
    known = np.asarray(positions)  # Under jit, jax would make even a constant unknown.
    low, high = known.min(initial=0), known.max(initial=0)
    if low < 0 or high >= count:
        raise ValueError(
            f"Positions {low} to {high} are not all in {where}: use shorter inputs, a larger "
            "table, or positions without one ('rotary', 'sinusoidal')."
        )
