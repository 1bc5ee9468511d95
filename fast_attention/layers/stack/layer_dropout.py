"""Layer dropout: whole layers are skipped in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool


def draw_layer_mask(key: Array, rate: float, depth: int) -> Bool[Array, " depth"]:
    """Draws which layers are used in a training step.

    The increment of a layer is multiplied by its entry, without rescaling. If all layers would be
    skipped, the first one is used, because otherwise there would be no gradient.

    Args:
      key: Random key.
      rate: Probability of skipping a layer, in ``[0, 1)``.
      depth: Number of layers.

    Returns:
      ``[depth]``, True for layers that are used.

    Raises:
      ValueError: If the rate is out of range.

    References:
      Fan et al. Reducing Transformer depth on demand with structured dropout. arXiv:1909.11556.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is the probability of skipping a layer, in [0, 1), got {rate}.")
    kept = jax.random.bernoulli(key, 1 - rate, (depth,))
    first = jnp.arange(depth) == 0
    return kept | (first & ~kept.any())
