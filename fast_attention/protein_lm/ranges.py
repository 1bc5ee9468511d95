"""What options and settings may be: one table of numbers for the command line, gin and Python."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers that an option may be.

    Attributes:
      low: The least.
      high: The greatest.
      whole: Whether only whole numbers are meant.
      above: Whether `low` itself is excluded.
      below: Whether `high` itself is excluded.
      zero: Whether 0 is allowed, too.
    """

    low: float
    high: float
    whole: bool = True
    above: bool = False
    below: bool = False
    zero: bool = False

    def __str__(self) -> str:
        """The range in words."""
        if self.whole:
            return f"a whole number from {self.low:,} to {self.high:,}"
        if self.above and self.below:
            return f"a number between {self.low:g} and {self.high:g}, both excluded"
        low = f"above {self.low:g} and" if self.above else f"from {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"up to {self.high:g}"
        return f"{'0 or ' if self.zero else ''}a number {low} {high}"

    def holds(self, value: Any) -> bool:
        """Whether a value is such a number."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        # NaN and infinite numbers fail these comparisons, which hold for integers of any size.
        if self.zero and value == 0:
            return True
        number: Any = value
        above = number > self.low if self.above else number >= self.low
        return bool(above and (number < self.high if self.below else number <= self.high))

    def parse(self, text: str) -> int | float:
        """Reads a number.

        Raises:
          ValueError: If the text is no number of the range; the message says what is expected.
        """
        try:
            # Python also reads 1_000 and digits of other scripts, which may be a slip.
            plain = text.isascii() and "_" not in text
            value = (int(text) if self.whole else float(text)) if plain else math.nan
        except ValueError:
            value = math.nan
        if not self.holds(value):
            raise ValueError(f"expected {self}, got {text[:80]!r}")
        return value


SEED = Range(0, 2**32 - 1)
COUNT = Range(1, 10**9)
"""Steps, frequencies, proteins to sample."""

BATCH_SIZE = Range(1, 2**16)
TOKENS_PER_BATCH = Range(1, 2**27)
LENGTH = Range(1, 10**7)
"""Residues or tokens of a protein."""

ROW = Range(2, 10**7)
"""Tokens of a row to train on."""

EPOCHS = Range(1, 10**6)
SEEDS = Range(1, 1000)
LAYER = Range(-1000, 1000)
HEAD = Range(1, 1000)
FEATURES = Range(1, 2**16)
RANK = Range(1, 2**12)
SAMPLED = Range(0, 10**6)
"""Proteins that a training run samples at its end."""

BATCHES = Range(0, 10**6)
PROCESSES = Range(1, 2**16)
PROCESS = Range(0, 2**16 - 1)
SECONDS = Range(1, 10**6)

TEMPERATURE = Range(0.001, 1000, whole=False, zero=True)
PENALTY = Range(0.01, 100, whole=False)
PROBABILITY = Range(0, 1, whole=False, above=True)
SHARE = Range(0, 1, whole=False, above=True, below=True)
ERROR = Range(0, 10, whole=False, above=True)
LEARNING_RATE = Range(0, 100, whole=False, above=True)
WEIGHT = Range(0, 1e9, whole=False, above=True)


WIDTH = Range(1, 2**16)
RATE = Range(0, 100, whole=False)
BELOW_ONE = Range(0, 1, whole=False, below=True)
NORM = Range(0, 1e9, whole=False, above=True)

TUNING = {
    "rank": RANK,
    "alpha": NORM,
    "learning_rate": RATE,
    "weight_decay": RATE,
    "grad_clip": NORM,
    "batch_size": BATCH_SIZE,
    "max_epochs": EPOCHS,
    "patience": EPOCHS,
    "test_share": SHARE,
    "valid_share": SHARE,
    "max_length": LENGTH,
    "seed": SEED,
}
"""Ranges of the fields of `tuning_config.TuningConfig`."""

SAMPLING = {
    "max_length": LENGTH,
    "min_length": Range(0, 10**7),
    "temperature": TEMPERATURE,
    "top_k": COUNT,
    "top_p": PROBABILITY,
    "repetition_penalty": PENALTY,
    "repetition_window": COUNT,
}
"""Ranges of the fields of `sampling_config.SamplingConfig`."""

_MODEL = {
    "random_seed": SEED,
    "batch_size": BATCH_SIZE,
    "learning_rate": RATE,
    "weight_decay": RATE,
    "grad_clip": NORM,
    "beta1": BELOW_ONE,
    "beta2": BELOW_ONE,
    "epsilon": PROBABILITY,
    "ema_decay": BELOW_ONE,
    "emb_dim": WIDTH,
    "num_heads": WIDTH,
    "num_kv_heads": WIDTH,
    "num_layers": HEAD,
    "qkv_dim": WIDTH,
    "mlp_dim": Range(1, 2**20),
    "max_len": LENGTH,
    "dropout_rate": BELOW_ONE,
    "attention_dropout_rate": BELOW_ONE,
    "redraw_interval": COUNT,
    "recalibrate_interval": COUNT,
}

SETTINGS: dict[str, dict[str, Range]] = {
    "experiment": {
        "batch_size_per_device": BATCH_SIZE,
        "batch_size": Range(1, 2**20),
        "max_train_steps": COUNT,
        "epochs": EPOCHS,
        "max_train_length": LENGTH,
        "max_eval_length": LENGTH,
        "data_seed": SEED,
        "valid_fraction": BELOW_ONE,
        "train_summary_frequency": COUNT,
        "eval_frequency": COUNT,
        "num_eval_steps": COUNT,
        "early_stopping": COUNT,
        "checkpoint_frequency": COUNT,
        "checkpoints_to_keep": COUNT,
        "num_samples": SAMPLED,
        "max_sample_length": LENGTH,
        "calibration_batches": BATCHES,
    },
    "FlaxModel": _MODEL,
    "FlaxLM": _MODEL,
    "FlaxBERT": _MODEL,
    "make_protein_domain": {"length": LENGTH},
    "create_learning_rate_scheduler": {
        "base_learning_rate": RATE,
        "warmup_steps": Range(0, 10**9),
        "decay_factor": RATE,
        "steps_per_decay": COUNT,
        "steps_per_cycle": COUNT,
    },
}
"""Ranges of what a gin configuration may bind, by configurable and parameter."""


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError if a value is none of these names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but got {value!r}")


def check(name: str, value: Any, allowed: Range) -> None:
    """Raises ValueError, which names the setting, if a value is out of its range."""
    if not allowed.holds(value):
        raise ValueError(f"{name} must be {allowed}, but got {value!r}")
