"""Sampling options of a causal model."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Sampling options of `FlaxLM`.

    Attributes:
      max_length: L, including the residues of the prompt; None uses the maximum of the model.
      min_length: Minimum number of residues, including those of the prompt.
      temperature: Divides the logits; 0 takes the most probable token.
      top_k: Sample from this number of most probable tokens.
      top_p: Sample from the fewest tokens that together have this probability.
      repetition_penalty: A value above 1 makes recently sampled tokens less probable.
      repetition_window: Number of previous tokens that the penalty counts; None counts all.
    """

    max_length: int | None = None
    min_length: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    repetition_window: int | None = None
