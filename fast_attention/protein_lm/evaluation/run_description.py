"""What there is to know about a run or an exported model, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_attention.protein_lm.data.alphabet import SPECIAL
from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.evaluation.evaluation_files import (
    format_evaluation_summary,
    read_evaluations,
)
from fast_attention.protein_lm.files.output_files import printable
from fast_attention.protein_lm.loading import open_run
from fast_attention.protein_lm.runs import (
    checkpoints,
    data_record,
    exporting,
    metrics_log,
    model_description,
    model_file,
)
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.wording import counted


def describe_run(
    run_dir: str | Path, *, with_corpus: bool = True, gin_file: Sequence[str] = ()
) -> dict[str, Any]:
    """Gathers what is known, in the form of JSON.

    Args:
      run_dir: A run, finished or not, with or without a checkpoint, or an exported folder.
      with_corpus: Whether to say which proteins it was trained on.
      gin_file: As for `loading.open_run`.

    Returns:
      ``folder``, ``kind`` (``"run"`` or ``"export"``), those of `descriptions.describe_model`,
      ``alphabet``, ``max_length``, ``checkpoints`` (steps), ``step`` and ``tokens`` (seen in
      training) of the newest or None, ``finished``, ``corpus`` (by split: ``files``, and
      ``proteins`` and ``residues`` where they are on record), ``metrics`` (the last row by
      split), ``evaluations`` (those on record, the newest first, each with its ``file``, ``date``
      and ``step``).

    Raises:
      RunError: If the folder is neither, or was changed.
    """
    model, about, folder = open_run(run_dir, gin_file=gin_file)
    exported = folder.is_export()
    steps = folder.steps_kept()
    newest = steps[-1] if steps else None
    step = exporting.exported_step(folder, about) if exported else newest
    rows = metrics_log.read_metrics(folder.metrics)
    return {
        "folder": str(folder.path),
        "kind": "export" if exported else "run",
        **model_description.describe_model(model),
        "alphabet": about["alphabet"],
        "max_length": model.max_length,
        "checkpoints": steps,
        "step": step,
        "tokens": None if step is None else tokens_seen(folder, step),
        "finished": exported or folder.result.is_file(),
        "corpus": _corpus(folder, about["training"] or {}) if with_corpus else {},
        "metrics": {row["split"]: row for row in rows},
        "evaluations": read_evaluations(folder),
    }


def tokens_seen(folder: RunFolder, step: int) -> int | None:
    """Tokens trained on up to a checkpoint; None where that is not on record."""
    exported = model_file.read(folder.model)["exported"]
    if exported is not None:
        return exported["tokens"]
    return checkpoints.tokens_seen(folder.checkpoints, step)


def format_information(about: dict[str, Any]) -> str:
    """The text that ``protein-lm info`` prints."""
    parameters = dict(about["parameters"])
    total, drawn = parameters.pop("total"), parameters.pop("drawn")
    causal = about["transformer"]["causal"]
    lines = [
        ("folder", f"{about['folder']} ({_status(about)})"),
        ("model", f"{about['model']}, {'causal' if causal else 'bidirectional'}"),
        ("Transformer", _options(about["transformer"], skip=("type", "vocab_size", "causal"))),
        ("attention", _attention(about["attention"])),
    ]
    objective = [about["objective"]["name"], _options(about["objective"], skip=("name",))]
    lines.append(("objective", ", ".join(filter(None, objective))))
    lines += [
        ("alphabet", _alphabet(about["alphabet"])),
        ("longest", counted(about["max_length"], "token")),
        ("parameters", f"{total:,} trained, and {drawn:,} drawn once"),
    ]
    lines += [("", f"{part.replace('_', '-'):<14}{n:>14,}") for part, n in parameters.items()]
    lines.append(("step", "none yet" if about["step"] is None else f"{about['step']:,}"))
    if about["tokens"] is not None:
        lines.append(("tokens seen", f"{about['tokens']:,}"))
    if about["kind"] == "run":
        steps = ", ".join(f"{step:,}" for step in about["checkpoints"])
        lines.append(("checkpoints", steps or "none yet"))
    lines += [(f"{split} data", _files(files)) for split, files in about["corpus"].items()]
    for split, row in about["metrics"].items():
        lines.append((f"{split} metrics", _options(row, skip=("split",))))
    # Names of files and of tokens are data, which must not look like other lines.
    text = "\n".join(f"{name:<16}{printable(value)}".rstrip() for name, value in lines)
    return "\n\n".join([text, *map(format_evaluation_summary, about["evaluations"])])


def _corpus(folder: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run was trained on, from its own record: a file that it names is never opened."""
    record = data_record.read_record(folder) or {}
    held_out = record.get("held_out") is not None
    bundled = bool(settings) and settings["train_files"] is None
    corpus = {}
    for split in data_record.SPLITS:
        files = [entry["file"] for entry in record.get(split, [])] or settings.get(f"{split}_files")
        if held_out and split == "valid":
            files = str(folder.held_out)
        if not files and bundled:
            files = str(bundled_corpus(split))
        if files:
            counts = {
                name: record[name].get(split) for name in data_record.COUNTS if name in record
            }
            files = [files] if isinstance(files, str) else list(files)
            corpus[split] = {"files": files} | counts
    return corpus


def _status(about: dict[str, Any]) -> str:
    if about["kind"] == "export":
        return "exported"
    return "finished run" if about["finished"] else "unfinished run"


def _options(values: dict[str, Any], skip: Sequence[str]) -> str:
    shown = {name: value for name, value in values.items() if name not in skip}
    return ", ".join(
        f"{name}={value:.5g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in shown.items()
        if value is not None
    )


def _attention(attention: str | dict[str, Any]) -> str:
    if isinstance(attention, str):
        return attention
    options = {
        name: _attention(value) if isinstance(value, dict) else value
        for name, value in attention.items()
    }
    return f"{attention['type']}({_options(options, skip=('type',))})"


def _alphabet(alphabet: dict[str, Any]) -> str:
    tokens = alphabet["tokens"]
    special = [
        f"{name} {alphabet[f'{name}_token']}"
        for name in SPECIAL
        if alphabet[f"{name}_token"] is not None
    ]
    return f"{len(tokens)} tokens, {' '.join(tokens)} ({', '.join(special)})"


def _files(split: dict[str, Any]) -> str:
    named = ", ".join(split["files"])
    if split.get("proteins") is None or split.get("residues") is None:
        return named
    return (
        f"{named}: {counted(split['proteins'], 'protein')}, {counted(split['residues'], 'residue')}"
    )
