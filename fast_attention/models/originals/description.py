"""The description of a published model (``config.json``), read field by field with types."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

MAX_SIZE = 2**20
"""The largest integer that a field may have; the largest published models have a tenth of it."""
SMALLEST, LARGEST = 1e-20, 1e12
"""Bounds of positive numbers: float32 computes with their squares."""


@dataclasses.dataclass(frozen=True)
class Description:
    """The fields of a description. Every method raises ValueError with the file and the field.

    Attributes:
      path: The file, for messages.
      fields: Its content.
    """

    path: Path
    fields: Mapping[str, Any]

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer from `least` on."""
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= MAX_SIZE:
            raise self._error(name, value, f"an integer of {least} to {MAX_SIZE}")
        return value

    def positive(self, name: str, default: float) -> float:
        """A positive number, from `SMALLEST` to `LARGEST`."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not SMALLEST <= value <= LARGEST:
            expected = f"a positive number, {SMALLEST:g} to {LARGEST:g}"
            raise self._error(name, value, expected)
        return float(value)

    def rate(self, name: str) -> float:
        """A dropout rate, 0 by default."""
        value = self._get(name, 0.0)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self._error(name, value, "a number of at least 0 and below 1")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null is the default."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._error(name, value, "true or false")
        return value

    def one_of(self, name: str, values: Collection[Any], default: Any) -> Any:
        """One of some values."""
        value = self._get(name, default)
        if value not in list(values):
            raise self._error(name, value, f"one of {', '.join(map(repr, values))}")
        return value

    def encoder(self) -> dict[str, Any]:
        """What ESM and BERT describe alike, as fields of `TransformerConfig`."""
        features, heads = self.size("hidden_size"), self.size("num_attention_heads")
        if features % heads:
            raise ValueError(f"{self.path}: hidden_size {features} is no multiple of {heads} heads")
        for name in ("is_decoder", "add_cross_attention"):
            self.one_of(name, (False,), False)
        return {
            "vocab_size": self.size("vocab_size"),
            "emb_dim": features,
            "num_heads": heads,
            "num_layers": self.size("num_hidden_layers"),
            "qkv_dim": features,
            "mlp_dim": self.size("intermediate_size"),
            "causal": False,
            "dropout_rate": self.rate("hidden_dropout_prob"),
            "attention_dropout_rate": self.rate("attention_probs_dropout_prob"),
            "tie_embeddings": self.flag("tie_word_embeddings", True),
            "attention_bias": True,
            "norm_epsilon": self.positive("layer_norm_eps", 1e-12),
            "logits_transform": True,
        }

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def _error(self, name: str, value: Any, expected: str) -> ValueError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ValueError(f"{self.path}: {name} is {shown}; expected {expected}")
