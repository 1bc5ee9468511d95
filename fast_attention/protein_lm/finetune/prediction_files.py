"""Predictions of a fine-tuned model for the proteins of FASTA files, as a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.files.tables import open_table
from fast_attention.protein_lm.finetune.finetuned import FineTuned
from fast_attention.protein_lm.inference.model_inputs import naming_the_longest, record_cost
from fast_attention.protein_lm.modeling import token_batches

CROP = (
    "skip long proteins with --on_error=skip, or fine-tune with --max_length, which also crops "
    "proteins for predictions"
)
_MOST = 2**16
"""Proteins whose vectors are in memory together."""


def predict_to_file(
    tuned: FineTuned, records: Iterable[FastaRecord], output: str | os.PathLike[str]
) -> int:
    """Predicts the property of proteins and writes a table of them, in their order.

    Its columns are ``id``, ``prediction`` and, of classes, ``p_<class>`` with their probabilities.
    Memory does not grow with the number of proteins.

    Args:
      tuned: The predictor.
      records: Proteins; read as they are needed.
      output: The table, see `tables.open_table`.

    Returns:
      The number of proteins.

    Raises:
      RunError: If some proteins need more memory than there is; the longest is named.
      ValueError: As `FineTuned.outputs` and `open_table`.
    """
    count = 0
    with open_table(output, prediction_columns(tuned.classes)) as write:
        for window in token_batches.windows(records, _cost, most=_MOST):
            ids = [record.id for record in window]
            lengths = [len(record.sequence) for record in window]
            with naming_the_longest(ids, lengths, CROP):
                outputs = tuned.outputs(record.sequence for record in window)
            for name, row in zip(ids, prediction_rows(tuned.classes, outputs), strict=True):
                write([name, *row])
            count += len(window)
    return count


def prediction_columns(classes: Sequence[str] | None) -> dict[str, type]:
    """Types of the columns of a table of predictions, by name, the id first."""
    if classes is None:
        return {"id": str, "prediction": float}
    return {"id": str, "prediction": str} | {f"p_{name}": float for name in classes}


def prediction_rows(classes: Sequence[str] | None, outputs: np.ndarray) -> Iterator[list[Any]]:
    """Yields what follows the id in each row, of outputs ``[N]`` or ``[N, K]``."""
    for output in outputs:
        if classes is None:
            yield [output]
        else:
            yield [classes[int(output.argmax())], *output]


def _cost(record: FastaRecord) -> int:
    return max(len(record.sequence) + 1, record_cost(record.id))
