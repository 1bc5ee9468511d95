"""Predictions of a fine-tuned model for the proteins of FASTA files, as a table."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.files.tables import open_table
from fast_attention.protein_lm.finetune.finetuned import FineTuned
from fast_attention.protein_lm.inference import partial_work
from fast_attention.protein_lm.inference.model_inputs import naming_the_longest, record_cost
from fast_attention.protein_lm.modeling import token_batches

CROP = (
    "skip long proteins with --on_error=skip, or fine-tune with --max_length, which also crops "
    "proteins for predictions"
)
_MOST = 2**16
"""Proteins whose vectors are in memory together."""


class Predicted(NamedTuple):
    """How many proteins were predicted, and how many of them by an earlier call."""

    proteins: int
    resumed: int


def predict_to_file(
    tuned: FineTuned, records: Iterable[FastaRecord], output: str | os.PathLike[str]
) -> Predicted:
    """Predicts the property of proteins and writes a table of them, in their order.

    Its columns are ``id``, ``prediction`` and, of classes, ``p_<class>`` with their probabilities.
    Memory does not grow with the number of proteins. If the call is interrupted, the same call
    resumes, see `partial_work`.

    Args:
      tuned: The predictor.
      records: Proteins; read as they are needed.
      output: The table, see `tables.open_table`.

    Raises:
      RunError: If some proteins need more memory than there is; the longest is named. If a call
        with another predictor was stopped.
      ValueError: As `FineTuned.outputs` and `open_table`.
    """
    count = resumed = 0
    with (
        partial_work.open_work(output, _settings(tuned)) as work,
        open_table(output, prediction_columns(tuned.classes)) as write,
    ):
        windows = token_batches.windows(records, _cost, most=_MOST)
        for number, window in enumerate(windows):
            ids = [record.id for record in window]
            content = (f"{record.id}\0{record.sequence}\0".encode() for record in window)
            digest = partial_work.content_digest(work, content)
            if partial_work.has_part(work, number, digest):
                resumed += len(window)
            else:
                lengths = [len(record.sequence) for record in window]
                with naming_the_longest(ids, lengths, CROP):
                    outputs = tuned.outputs(record.sequence for record in window)
                partial_work.save_part(work, number, digest, {"outputs": outputs})
            outputs = partial_work.read_part(work, number, digest, ["outputs"])["outputs"]
            for name, row in zip(ids, prediction_rows(tuned.classes, outputs), strict=True):
                write([name, *row])
            count += len(window)
    partial_work.remove_parts(work)
    return Predicted(count, resumed)


def _settings(tuned: FineTuned) -> dict[str, Any]:
    head = hashlib.sha256()
    for array in tuned.head:
        head.update(np.ascontiguousarray(array).tobytes())
    others = {"head": head.hexdigest(), "classes": tuned.classes}
    return partial_work.settings(
        "predict", tuned.model, token_batches.TOKENS_PER_BATCH, tuned.max_length, others
    )


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
