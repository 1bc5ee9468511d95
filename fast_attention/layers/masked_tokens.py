"""Embeddings of sequences with masked tokens.

Shape letters: B batch, T length, M features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.layers.token_shift import starts_of_runs


def drop_masked_tokens(
    x: Float[Array, "B T M"],
    masked: Bool[Array, "B T"],
    rate: float,
    *,
    key_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T M"]:
    """Sets embeddings of masked tokens to zero and scales the others, as in ESM-2.

    The factor is ``(1 - rate) / (1 - n / N)`` for n masked tokens among N visible ones, so that the
    embeddings of a sequence have the same average scale as in training.

    Args:
      x: ``[B, T, M]`` embeddings.
      masked: ``[B, T]``, True where the token is the mask token.
      rate: Average share of masked tokens in training; 0.15 * 0.8 for ESM-2.
      key_mask: ``[B, T]``, False is padding, which is not counted.
      segment_ids: ``[B, T]``; each run of equal ids is a separate sequence.

    Returns:
      ``[B, T, M]`` in the dtype of `x`.

    References:
      Lin et al. Evolutionary-scale prediction of atomic-level protein structure with a language
      model. Science 379 (2023); ``token_dropout`` of github.com/facebookresearch/esm.
    """
    visible = jnp.ones(masked.shape, bool) if key_mask is None else key_mask
    counted = jnp.stack([masked & visible, visible], axis=-1).astype(jnp.float32)
    if segment_ids is None:
        counts = counted.sum(axis=1, keepdims=True)
    else:
        starts = starts_of_runs(segment_ids, None)
        assert starts is not None
        runs = jnp.cumsum(starts, axis=1)
        length = masked.shape[1]
        counts = jax.vmap(
            lambda counted, runs: jax.ops.segment_sum(counted, runs, length + 1)[runs]
        )(counted, runs)
    # A sequence of masked tokens alone is zero, whatever its factor.
    factor = (1 - rate) / jnp.maximum(1 - counts[..., 0] / jnp.maximum(counts[..., 1], 1), 1e-6)
    factor = jnp.where(masked, 0, factor)[..., None]
    return (x * factor).astype(x.dtype)
