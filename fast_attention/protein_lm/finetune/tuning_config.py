"""How a property of proteins is learned: the options of fine-tuning."""

from __future__ import annotations

import dataclasses

from fast_attention.protein_lm import ranges

METHODS = ("frozen", "lora", "full")
_LEARNING_RATES = {"frozen": 0.0, "lora": 1e-3, "full": 1e-4}


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a property is learned.

    Attributes:
      method: Of `METHODS`.
      rank: r of the adapters.
      alpha: Adapters are scaled by alpha / r.
      learning_rate: None takes 1e-3 for adapters and 1e-4 for all parameters.
      weight_decay: AdamW's, of gradient steps.
      grad_clip: Largest global norm of a gradient; None does not clip.
      batch_size: Proteins of a gradient step.
      max_epochs: Most passes through the proteins.
      patience: Epochs without improvement on the validation part after which to stop.
      balanced: Whether the classes of the training part count equally, however many proteins they
        have.
      test_share: Held out for the report, where the proteins have no parts.
      valid_share: Of the rest, to choose penalties and to stop early.
      max_length: Crops proteins to this many residues; None takes them whole.
      seed: Of every draw.
    """

    method: str = "frozen"
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float | None = None
    weight_decay: float = 0.01
    grad_clip: float | None = 1.0
    batch_size: int = 16
    max_epochs: int = 20
    patience: int = 3
    balanced: bool = False
    test_share: float = 0.2
    valid_share: float = 0.1
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self):
        """Raises ValueError at a value out of its range."""
        ranges.check_choice("method", self.method, METHODS)
        for name, allowed in ranges.TUNING.items():
            value = getattr(self, name)
            if value is not None or name not in ("learning_rate", "grad_clip", "max_length"):
                ranges.check(name, value, allowed)
        if not isinstance(self.balanced, bool):
            raise ValueError(f"balanced must be True or False, but got {self.balanced!r}")

    @property
    def adapter_rank(self) -> int | None:
        """R of the adapters; None where there are none."""
        return self.rank if self.method == "lora" else None

    @property
    def scale(self) -> float:
        """What adapters are scaled by."""
        return self.alpha / self.rank

    @property
    def rate(self) -> float:
        """The learning rate after the warm-up."""
        return _LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate
