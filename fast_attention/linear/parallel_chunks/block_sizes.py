"""How many positions the form for GPUs handles at once.

Shape letters: B batch, T length, H heads, M features, C chunk.
"""

from __future__ import annotations

from typing import NamedTuple

from fast_attention.linear.types import Inputs, Plan

CHUNK = 128
"""C: a smaller one has more states, a larger one more pairs inside chunks."""

FEATURES_AT_ONCE = 2**23
"""``B * H * M * positions`` of a block: 64 MiB of exponents. Fewer would be more launches."""

MOST_CHUNKS = 32
"""Chunks of a block: each state is a sum over all chunks before it."""


class BlockSizes(NamedTuple):
    """Positions in a chunk, and in a block of chunks."""

    chunk: int
    block: int


def block_sizes(plan: Plan, inputs: Inputs) -> BlockSizes:
    """Returns the sizes for a causal call."""
    length = inputs.query.shape[1]
    chunk = min(plan.chunk_size or CHUNK, length)
    chunks = min(MOST_CHUNKS, max(1, positions_at_once(plan, inputs) // chunk))
    # Blocks of equal length, or the last one would be compiled by itself.
    blocks = -(-length // (chunk * chunks))
    return BlockSizes(chunk, min(length, chunk * -(-length // (chunk * blocks))))


def positions_at_once(plan: Plan, inputs: Inputs) -> int:
    """Returns how many positions of all rows and heads are handled at once."""
    batch, _, heads, width = inputs.query.shape
    features = plan.feature_map.num_features(inputs.parameters, width)
    return max(1, FEATURES_AT_ONCE // (batch * heads * features))
