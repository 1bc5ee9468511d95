"""Predict each residue from those before it, and the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.packing import PackedRows
from fast_attention.protein_lm.modeling.encoding import Encoded, with_end
from fast_attention.protein_lm.modeling.objectives.base import Batch, Objective, Question
from fast_attention.protein_lm.modeling.sampling_config import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Causal(Objective):
    """A sequence ``x1 .. xn`` has targets ``x1 .. xn EOS`` and inputs ``BOS x1 .. xn``."""

    name = "causal"
    causal = True
    begins = True
    corrupts = False
    exact = True
    samples = True
    infills = False
    methods = ("log-likelihood-ratio",)
    sampling_options = tuple(field.name for field in dataclasses.fields(SamplingConfig))

    def batch(self, rows: PackedRows, alphabet: Alphabet, draws: np.ndarray) -> Batch:
        """Targets are the sequences, inputs the same shifted behind a begin token."""
        inputs = np.roll(rows.tokens, 1, axis=1)
        inputs[rows.positions == 0] = alphabet.begin
        visible = rows.segment_ids > 0
        return {
            "inputs": np.where(visible, inputs, rows.tokens),
            "targets": rows.tokens,
            "weights": visible.astype(np.float32),
            "segment_ids": rows.segment_ids,
            "positions": rows.positions,
        }

    def read(self, alphabet: Alphabet, item: Encoded) -> np.ndarray:
        """The begin token and the residues."""
        return np.append(alphabet.begin, item.residues)

    def questions(self, alphabet: Alphabet, item: Encoded) -> Iterator[Question]:
        """One question: all residues and the end, each given what stands before it."""
        targets = with_end(alphabet, item)
        yield Question(np.append(alphabet.begin, targets[:-1]), targets)
