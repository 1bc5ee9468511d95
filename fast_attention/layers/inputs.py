"""Inputs of the layers of a stack in addition to the residual stream."""

from __future__ import annotations

from typing import NamedTuple

from fast_attention.arrays.types import Array, Bool, Float, Int


class Inputs(NamedTuple):
    """Positions and masks of the tokens, and a second sequence.

    Attributes:
      positions: ``[B, T]``, the position of every token, for rotary positions.
      segment_ids: ``[B, T]``; positions see their own run of equal ids.
      key_mask: ``[B, T]``; positions where it is False (padding) are not seen.
      context: ``[B, S, N]``, a second sequence.
      context_mask: ``[B, S]``; context positions where it is False are not seen.
      mask: ``[B, T, T]``; position t sees s where it is True, for attention that supports such
        masks.
    """

    positions: Int[Array, "B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    key_mask: Bool[Array, "B T"] | None = None
    context: Float[Array, "B S N"] | None = None
    context_mask: Bool[Array, "B S"] | None = None
    mask: Bool[Array, "B T T"] | None = None
