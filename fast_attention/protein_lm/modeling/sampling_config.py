"""How a causal model draws."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How `FlaxLM` draws.

    Attributes:
      max_length: L, residues of the prompt included; None takes the most that the model can write.
      min_length: Residues, those of the prompt included, before which no sequence ends.
      temperature: Divides the logits; 0 takes the most probable token.
      top_k: Draw among so many most probable tokens.
      top_p: Draw among the fewest tokens that together have this probability.
      repetition_penalty: Above 1 makes tokens drawn lately less probable.
      repetition_window: How many tokens back that looks; None looks at all.
    """

    max_length: int | None = None
    min_length: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    repetition_window: int | None = None
