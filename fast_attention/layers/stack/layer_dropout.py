"""Layer dropout: whole layers are left out in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool


def draw_layer_mask(key: Array, rate: float, depth: int) -> Bool[Array, " depth"]:
    """Draws which layers take part in a step of training.

    What a layer adds is multiplied by its entry, and not rescaled. If all were left out, the first
    takes part: without it there would be no gradient.

    Args:
      key: Random key.
      rate: Probability to leave a layer out, in ``[0, 1)``.
      depth: How many layers there are.

    Returns:
      ``[depth]``, True where a layer takes part.

    Raises:
      ValueError: At a rate out of range.

    References:
      Fan et al. Reducing Transformer depth on demand with structured dropout. arXiv:1909.11556.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is a probability to leave layers out, in [0, 1), got {rate}.")
    kept = jax.random.bernoulli(key, 1 - rate, (depth,))
    first = jnp.arange(depth) == 0
    return kept | (first & ~kept.any())
