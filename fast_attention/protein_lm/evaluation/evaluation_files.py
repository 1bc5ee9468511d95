"""The evaluations of a run: files in its folder, none of which replaces that of other proteins."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Any

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation.report import format_table
from fast_attention.protein_lm.files.json_files import check_fields, read_json, shown
from fast_attention.protein_lm.files.output_files import write_json
from fast_attention.protein_lm.runs.run_folder import RunFolder, inside
from fast_attention.protein_lm.wording import counted, source

_SAME = ("step", "digest", "max_residues", "seed", "num_seeds", "errors")
"""What makes two evaluations one and the same, given again."""

_SHOWN = {
    "objective": str | None,
    "fasta": list[str],
    "digest": str | None,
    "proteins": int,
    "residues": int,
    "scores": list[dict],
}
_SCORE = {"name": str, "perplexity": float | None, "accuracy": float | None}


def now() -> str:
    """The time in UTC, as ``2026-01-31T12:00:00+00:00``."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_evaluation(folder: RunFolder, result: dict[str, Any]) -> Path | None:
    """Writes ``evaluation.json`` into a run's folder.

    An evaluation that is there and differs in the proteins, the checkpoint or the settings gets
    another name first: ``evaluation-<its date>.json``.

    Args:
      folder: Of the run.
      result: From `evaluation.evaluate_on`, with ``step`` and ``date``.

    Returns:
      Where the earlier evaluation is now, or None.

    Raises:
      OutputError: If a file cannot be written.
    """
    kept = None
    if folder.evaluation.is_file():
        before = _object(folder.evaluation, read_json(folder.evaluation))
        if any(before.get(name) != result.get(name) for name in _SAME):
            date = re.sub(r"\W", "-", _date(folder.evaluation, before))[:19]
            names = (f"evaluation-{date}{'' if n == 0 else f'-{n}'}.json" for n in range(10**6))
            kept = next(path for name in names if not (path := folder.path / name).exists())
            os.rename(folder.evaluation, kept)
    write_json(folder.evaluation, result)
    return kept


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """What ``evaluate`` and the end of training left in a run's folder, the newest first."""
    found = []
    names = sorted(path.name for path in folder.path.glob("evaluation*.json"))
    for path in [*(inside(folder.path, name) for name in names), folder.result]:
        if path.is_file():
            content = _object(path, read_json(path))
            result = content.get("evaluation") if path == folder.result else content
            if result:
                checked = _check(path, _object(path, result))
                about = {"file": path.name, "date": _date(path, result), "step": _step(content)}
                found.append(about | checked)
    return sorted(found, key=lambda one: one["date"], reverse=True)


def _object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunError(
            f"{path}: {shown(value)} is not an evaluation; remove the file, or restore it"
        )
    return value


def _check(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What is shown of an evaluation, with the types that it has."""
    found = check_fields(path, "", {name: result.get(name) for name in _SHOWN}, _SHOWN)
    rows = [_object(path, row) for row in found["scores"]]
    found["scores"] = [
        check_fields(path, "scores", {name: row.get(name) for name in _SCORE}, _SCORE)
        for row in rows
    ]
    return found


def format_evaluation_summary(found: dict[str, Any]) -> str:
    """The scores of an evaluation, below a line that names the proteins."""
    digest = f", sha256 {found['digest'][:12]}" if found.get("digest") else ""
    step = "" if found["step"] is None else f", step {found['step']:,}"
    size = f"{counted(found['proteins'], 'protein')}, {counted(found['residues'], 'residue')}"
    fasta = ", ".join(map(source, found["fasta"]))
    caption = f"evaluation of {fasta}: {size}{digest}{step}, {found['date']} ({found['file']})"
    table = format_table(
        ("", "perplexity", "accuracy"),
        [
            (row["name"], _number(row["perplexity"]), f"{_number(row['accuracy'], 100)} %")
            for row in found["scores"]
        ],
    )
    return f"{caption}\n{table}"


def _number(value: float | None, scale: float = 1.0) -> str:
    """JSON has null for a number that is not finite."""
    return "nan" if value is None else f"{scale * value:.2f}"


def _step(content: dict[str, Any]) -> int | None:
    """The step of the checkpoint that was evaluated, in either kind of file."""
    step = content.get("evaluated_step", content.get("step"))
    return step if isinstance(step, int) else None


def _date(path: Path, content: dict[str, Any]) -> str:
    """When an evaluation was made: as it is recorded, or the time of the file."""
    if isinstance(content.get("date"), str):
        return content["date"]
    time = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return time.isoformat(timespec="seconds")
