"""Fine-tuning on a table of proteins: from files to a folder with a predictor and a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.fasta import FastaPaths, read_proteins
from fast_attention.protein_lm.data.fasta_parser import MAX_RESIDUES
from fast_attention.protein_lm.data.skipped_records import SkippedRecords, tell
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation.report import format_table, shared_note
from fast_attention.protein_lm.files.json_files import read_json
from fast_attention.protein_lm.files.output_files import (
    check_output_folder,
    json_text,
    open_output_folder,
    write_json,
)
from fast_attention.protein_lm.files.tables import open_table
from fast_attention.protein_lm.finetune.finetuned import FineTuned, fingerprint
from fast_attention.protein_lm.finetune.finetuning import fine_tune
from fast_attention.protein_lm.finetune.labelled import Labelled, read_labelled
from fast_attention.protein_lm.finetune.prediction_files import prediction_columns, prediction_rows
from fast_attention.protein_lm.finetune.tuning_config import TuningConfig
from fast_attention.protein_lm.inference.model_inputs import longest_record
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.modeling.encoding import longest_protein
from fast_attention.protein_lm.runs.run_folder import RunFolder, check_predictor_folder, content
from fast_attention.protein_lm.wording import counted, place

_SHOWN_CLASSES = 12
_FEW = 20
"""Fewer proteins than this give a correlation or a share of hits mostly by chance."""

_PARTS = {"train": "training", "valid": "validation", "test": "test"}
RESULT = "result.json"
_METRICS, _PREDICTIONS = "metrics.jsonl", "predictions.tsv"


def run_tuning(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    task: str,
    fasta: FastaPaths | None = None,
    columns: Mapping[str, Any] | None = None,
    whole_model: bool = False,
    gin_file: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tunes the model of a run and writes a folder.

    The folder holds what `FineTuned.load` reads, ``metrics.jsonl`` (a row for each epoch),
    ``predictions.tsv`` (every protein of the table) and, written last, ``result.json``. Where
    it is there, and of equal arguments, it is only printed. The folder appears when
    it is complete, see `output_files.open_output_folder`.

    Args:
      run_dir: The run.
      output: The folder, made when absent.
      table: Proteins with labels.
      task: ``"regression"`` or ``"classification"``.
      fasta: Files with the residues, by id; None takes them from the table.
      columns: Keywords of `labelled.read_labelled`.
      whole_model: Whether to store the whole model.
      gin_file: As for `loading.open_run`.
      options: Fields of `tuning_config.TuningConfig`.

    Returns:
      The content of ``result.json``.

    Raises:
      OutputError: If the folder cannot be written.
      RunError: If it holds another result, or a table cannot be read.
      ValueError: If an option is out of its range.
    """
    folder, columns, options = Path(output), dict(columns or {}), dict(options or {})
    result_file = folder / RESULT
    check_predictor_folder(RunFolder(folder), _METRICS, _PREDICTIONS)
    if not result_file.exists():
        # What this command left when it was killed has predictions.
        if content(RunFolder(folder)) and not (folder / _PREDICTIONS).exists():
            raise RunError(
                f"{folder} holds a predictor that was saved in Python: give another folder, or "
                "remove this one"
            )
        check_output_folder(folder)
    loaded = load_run(run_dir, gin_file=gin_file)
    alphabet = loaded.model.domain.vocab
    cropped = bool(options.get("max_length"))
    limit = MAX_RESIDUES if cropped else longest_record(alphabet, longest_protein(loaded.model))[0]
    found = _read_table(table, fasta, columns, alphabet, limit, numeric=task == "regression")
    asked = {
        "trunk": fingerprint(loaded.model),
        "data": hashlib.sha256(json.dumps(found).encode()).hexdigest(),
        "task": task,
        "options": dataclasses.asdict(TuningConfig(**options)),
        "whole_model": whole_model,
    }
    if result_file.is_file():
        result = read_json(result_file)
        changed = [name for name in asked if result.get("asked", {}).get(name) != asked[name]]
        if changed:
            raise RunError(
                f"{folder} holds the result of another {', '.join(changed)}: give another folder, "
                "or remove this one"
            )
        print(f"{place(folder)} is finished\n\n{format_result(result, folder)}")
        return result
    for reason in found.left_out:
        print(f"left out: {reason}")
    with open_output_folder(folder, last=result_file.name) as path:
        with open(path / _METRICS, "w", encoding="utf-8") as lines:

            def log(row: dict[str, Any]) -> None:
                lines.write(json_text(row) + "\n")
                if row["split"] != "train" and not messages.is_quiet():
                    print(_progress(row), flush=True)

            tuned = fine_tune(
                loaded.model,
                found.sequences,
                found.labels,
                task=task,
                parts=found.parts,
                groups=found.groups,
                log=log,
                **options,
            )
        assert tuned.fit is not None
        tuned.save(path, run_dir=loaded.folder.path, whole=whole_model)
        _write_predictions(path / _PREDICTIONS, tuned, found)
        result = {
            "asked": asked,
            "method": tuned.method,
            "classes": tuned.classes,
            "left_out": len(found.left_out),
            "metrics": tuned.fit.metrics,
        }
        write_json(path / result_file.name, result)
    result = read_json(result_file)
    print(f"\n{format_result(result, folder)}")
    return result


def _read_table(
    table: str | os.PathLike[str],
    fasta: FastaPaths | None,
    columns: Mapping[str, Any],
    alphabet: Alphabet,
    longest: int,
    *,
    numeric: bool,
) -> Labelled:
    """Reads the labels, and the residues from the table or from FASTA files.

    A row may have at most `longest` of them; other records of the FASTA files may have more.
    """
    sequences = None
    if fasta is not None:
        skipped = SkippedRecords()
        records = read_proteins(
            fasta,
            alphabet=alphabet,
            on_error=columns.get("on_error", "raise"),
            skipped=skipped,
            unique_ids=True,
            max_residues=max(longest, alphabet.longest),
            too_long=longest_record(alphabet)[1],
        )
        sequences = {record.id: record.sequence for record in records}
        tell(skipped)
    return read_labelled(
        table,
        **columns,
        sequences=sequences,
        alphabet=alphabet,
        longest=longest,
        numeric=numeric,
    )


def _write_predictions(path: Path, tuned: FineTuned, found: Labelled) -> None:
    """Writes what was predicted for every protein of the table, beside its label."""
    assert tuned.fit is not None
    types = prediction_columns(tuned.classes)
    columns = {"id": types.pop("id"), "part": str, "label": str} | types
    predicted = prediction_rows(tuned.classes, tuned.fit.outputs)
    parts = tuned.fit.parts.tolist()
    with open_table(path, columns) as write:
        for *given, row in zip(found.ids, parts, found.labels, predicted, strict=True):
            write([*given, *row])


def format_result(result: dict[str, Any], folder: Path) -> str:
    """What a finished fine-tuning reached, as printed at its end."""
    parts = [format_metrics(result["classes"], result["metrics"])]
    for part, found in result["metrics"].items():
        if note := shared_note(_PARTS[part], found["shared"], found["proteins"]):
            parts.append(note)
        if part != "train" and (note := _few_note(found["proteins"])):
            parts.append(f"the figures of '{part}' are of {note}")
    held = "test" if "test" in result["metrics"] else "valid"
    if held == "valid":
        parts.append(
            "no protein is held out for a test: the metrics of 'valid' are too good, because "
            "these proteins were used to choose the model"
        )
    if result["classes"] is not None and len(result["classes"]) <= _SHOWN_CLASSES:
        confusion = zip(result["classes"], result["metrics"][held]["confusion"], strict=True)
        told = [(name, *map(str, counts)) for name, counts in confusion]
        parts.append(format_table((f"{held}: true, predicted", *result["classes"]), told))
    parts.append(
        f"written to {place(folder)}: protein-lm predict --model={place(folder)} predicts more"
    )
    return "\n\n".join(parts)


def format_metrics(classes: Sequence[str] | None, metrics: Mapping[str, Any]) -> str:
    """A table of the figures of each part, for a regression or for classes."""
    if classes is None:
        names = ("spearman", "r2", "rmse", "rmse_of_mean")
    else:
        names = ("accuracy", "accuracy_of_majority", "macro_f1")
    rows = [
        (part, f"{found['proteins']:,}", *(_figure(name, found[name]) for name in names))
        for part, found in metrics.items()
    ]
    return format_table(("", "proteins", *(name.replace("_", " ") for name in names)), rows)


def _progress(row: dict[str, Any]) -> str:
    where = "frozen trunk" if row["split"] == "frozen" else f"epoch {row['epoch']}"
    names = ("loss", "spearman", "accuracy")
    figures = ", ".join(f"{name} {row[name]:.4f}" for name in names if name in row)
    number = row["proteins"]
    return f"{where}: validation {figures} (of {_few_note(number) or counted(number, 'protein')})"


def _few_note(number: int) -> str:
    """Says that proteins are too few for their figures to mean much; empty if they are not."""
    if number >= _FEW:
        return ""
    return f"{counted(number, 'protein')}, which is too few: use {_FEW} or more"


def _figure(name: str, value: float | None) -> str:
    """A figure in a table; errors are in units of the label and may have any size."""
    if value is None:
        return "none"
    return f"{value:.4g}" if name.startswith("rmse") else f"{value:.3f}"
