"""How a model is made linear."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from fast_attention import make_fast_softmax_attention
from fast_attention.feature_maps import TUNED_ESTIMATORS
from fast_attention.mechanisms.favor.fn import FastAttention
from fast_attention.protein_lm.ranges import check_choice

Method = Literal["none", "lora", "full"]
METHODS = ("none", "lora", "full")


@dataclasses.dataclass(frozen=True)
class LinearizeConfig:
    """Settings of `run_linearize`.

    Attributes:
      estimator: As for `make_fast_softmax_attention`. Tuned estimators are calibrated on four
        batches; "wderf" and "wderf_s" are trained from there.
      nb_features: M; None is 2 D of the model's heads for "hedgehog" and 256 for others.
      exact_window: As there.
      keep_exact: How many layers, those of the largest error, stay exact.
      transfer_steps: Of attention transfer.
      transfer_rate: Its highest learning rate; None is 1e-3 for tuned estimators, whose calibrated
        parameters are near the best ones already, and 1e-2 for others.
      finetune: What is trained after it: "none", "lora" (adapters of dense layers, and features)
        or "full" (all parameters).
      finetune_steps: Of that.
      finetune_rate: Its highest learning rate; None is 1e-3 for "lora" and 1e-4 for "full".
      rank: Of the adapters.
      kl_weight: Of the divergence from the exact model beside the model's own loss.
      batch_size: Proteins at a time.
      max_length: Tokens of a training row; longer proteins are cropped.
      save_every: Steps between two saved states, from which an interrupted run resumes.
      seed: Of order, masks, crops and draws.
    """

    estimator: str = "hedgehog"
    nb_features: int | None = None
    exact_window: int | None = None
    keep_exact: int = 0
    transfer_steps: int = 500
    transfer_rate: float | None = None
    finetune: Method = "lora"
    finetune_steps: int = 500
    finetune_rate: float | None = None
    rank: int = 8
    kl_weight: float = 1.0
    batch_size: int = 8
    max_length: int = 512
    save_every: int = 50
    seed: int = 0

    def __post_init__(self):
        """Raises ValueError for values out of range."""
        check_choice("finetune", self.finetune, METHODS)
        for name in ("rank", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        for name in ("keep_exact", "transfer_steps", "finetune_steps", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("transfer_rate", "finetune_rate"):
            if not (getattr(self, name) is None or getattr(self, name) > 0):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def feature_rate(self) -> float:
        """The learning rate of attention transfer."""
        if self.transfer_rate is not None:
            return self.transfer_rate
        return 1e-3 if self.estimator in TUNED_ESTIMATORS else 1e-2

    @property
    def rate(self) -> float:
        """The learning rate of fine-tuning."""
        if self.finetune_rate is not None:
            return self.finetune_rate
        return 1e-3 if self.finetune == "lora" else 1e-4

    def attention_fn(self, causal: bool, head_dim: int) -> FastAttention:
        """Makes the attention function to end with."""
        number = self.nb_features
        if number is None:
            number = 2 * head_dim if self.estimator == "hedgehog" else 256
        options: dict[str, Any] = {}
        if self.estimator in TUNED_ESTIMATORS:
            trainable = self.estimator in ("wderf", "wderf_s")
            options["projection"] = "orthogonal_antithetic"
            options["calibration"] = "trained" if trainable else "stored"
        return make_fast_softmax_attention(
            nb_features=number,
            estimator=self.estimator,
            exact_window=self.exact_window,
            unidirectional=causal,
            seed=self.seed,
            **options,
        )
