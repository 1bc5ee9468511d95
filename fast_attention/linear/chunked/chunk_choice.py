"""Which chunk to take: the measured one of the nearest shape.

Shape letters: D head width, M features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from fast_attention.linear.chunked.chunk_table import CHUNKS
from fast_attention.linear.types import Inputs, Plan

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
    head_dim: int,
    num_features: int,
    chunks: Mapping[tuple[str, bool, int, int], tuple[int, int]] = CHUNKS,
) -> ChunkChoice:
    """Returns the chunk measured to be best for the nearest shape.

    Args:
      platform: as ``jax.default_backend()`` names it; one without rows is served by those of the
        CPU.
      causal: causal or bidirectional attention.
      head_dim: D; near is what has a small ratio.
      num_features: M; the same. Of two equally near shapes the smaller one counts.
      chunks: the table.

    Raises:
      ValueError: if a width is below 1.
    """
    if head_dim < 1 or num_features < 1:
        raise ValueError(
            f"head_dim and num_features must be at least 1, got {head_dim} and {num_features}."
        )

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log(shape[0] / head_dim)) + abs(math.log(shape[1] / num_features))

    for name in (platform, FALLBACK):
        measured = sorted((d, m) for row, kind, d, m in chunks if (row, kind) == (name, causal))
        if measured:
            return ChunkChoice(*chunks[name, causal, *min(measured, key=distance)])
    raise ValueError(f"The table has no row of {platform} or {FALLBACK} with causal={causal}.")


def planned_chunk(plan: Plan, inputs: Inputs) -> ChunkChoice:
    """Returns what the plan asks for, completed by the choice for the platform JAX runs on."""
    head_dim = inputs.key.shape[-1]
    features = plan.feature_map.num_features(inputs.parameters, head_dim)
    chosen = chunk_choice(jax.default_backend(), plan.causal, head_dim, features)
    return ChunkChoice(plan.chunk_size or chosen.chunk_size, plan.unroll or chosen.unroll)
