"""Which chunk to take: the measured one of the nearest number of features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from fast_attention.linear_attention.chunk_table import CHUNKS
from fast_attention.linear_attention.inputs import Inputs, Plan

FALLBACK = "cpu"
"""Platform whose rows serve one that has none."""


class ChunkChoice(NamedTuple):
    """How a sequence is cut.

    Attributes:
      chunk_size: positions handled at once.
      unroll: chunks unrolled in the compiled loop.
    """

    chunk_size: int
    unroll: int


def chunk_choice(
    platform: str,
    causal: bool,
    num_features: int,
    chunks: Mapping[tuple[str, bool, int], tuple[int, int]] = CHUNKS,
) -> ChunkChoice:
    """Returns the chunk measured to be best for the nearest number of features.

    Args:
      platform: as ``jax.default_backend()`` names it; one without rows is served by those of the
        CPU.
      causal: causal or bidirectional attention.
      num_features: M; nearest by ratio, and the smaller one of two equally near.
      chunks: the table.

    Raises:
      ValueError: if ``num_features`` is below 1.
    """
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}.")
    for name in (platform, FALLBACK):
        measured = sorted(m for row, kind, m in chunks if (row, kind) == (name, causal))
        if measured:
            nearest = min(measured, key=lambda m: abs(math.log(m / num_features)))
            return ChunkChoice(*chunks[name, causal, nearest])
    raise ValueError(f"The table has no row of {platform} or {FALLBACK} with causal={causal}.")


def planned_chunk(plan: Plan, inputs: Inputs) -> ChunkChoice:
    """Returns what the plan asks for, completed by the choice for the platform JAX runs on."""
    features = plan.feature_map.num_features(inputs.parameters, inputs.key.shape[-1])
    chosen = chunk_choice(jax.default_backend(), plan.causal, features)
    return ChunkChoice(plan.chunk_size or chosen.chunk_size, plan.unroll or chosen.unroll)
