"""What a run is trained on: digests of its files, kept in its folder and compared on resuming."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fast_attention.protein_lm.data.fasta import FastaPaths, fasta_paths
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import read_json
from fast_attention.protein_lm.files.output_files import write_json
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.runs.run_folder import RunFolder

SPLITS = ("train", "valid", "test")

COUNTS = ("proteins", "residues")
"""What is counted of each split."""

Entry = dict[str, Any]


def list_files(files: FastaPaths | Mapping[str, float] | None) -> list[tuple[Path, float | None]]:
    """The files of a split, each with its weight or None.

    Args:
      files: FASTA files or folders of them, or a dict from those to weights; None has none.

    Raises:
      FastaError: If a folder has no FASTA file, or a file is a pipe.
    """
    if files is None:
        return []
    if isinstance(files, Mapping):
        return [
            (path, float(weight))
            for given, weight in files.items()
            for path in _regular_files(given)
        ]
    return [(path, None) for path in _regular_files(files)]


def _regular_files(fasta: FastaPaths) -> list[Path]:
    paths = fasta_paths(fasta)
    for path in paths:
        if path.exists() and not path.is_file():
            raise FastaError(
                f"{path}: is a pipe or a device, but training reads its files more than once, and "
                "again when it resumes. Write its content to a file first."
            )
    return paths


def describe_files(files: FastaPaths | Mapping[str, float] | None) -> list[Entry]:
    """Describes the files of a split: ``file`` (its name), ``sha256``, ``bytes`` and ``weight``.

    Args:
      files: As for `list_files`.

    Raises:
      FastaError: If a file cannot be read.
    """
    return [
        {"file": str(path), "sha256": _digest(path), "bytes": path.stat().st_size, "weight": weight}
        for path, weight in list_files(files)
    ]


def read_record(folder: RunFolder) -> Entry | None:
    """The record of a run, None where there is none.

    Raises:
      RunError: If the file is damaged.
    """
    if not folder.data.exists():
        return None
    try:
        record = read_json(folder.data)
        for split in SPLITS:
            for entry in record[split]:
                found = (entry["file"], entry["sha256"], entry["bytes"], entry["weight"])
                if tuple(map(type, found[:3])) != (str, str, int):
                    raise TypeError(found)
        for name in COUNTS:
            for split, number in record.get(name, {}).items():
                if split not in SPLITS or type(number) is not int:
                    raise TypeError(f"{name}: {split}: {number!r}")
        return record
    except (RunError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder.data} is damaged, so the training data cannot be checked: copy the file "
            "again from the original folder, or remove it to resume without this check"
        ) from error


def write_record(folder: RunFolder, record: Entry, *, step: int, before: Entry | None) -> None:
    """Writes the record of a run.

    Args:
      folder: Of the run.
      record: From split names to what `describe_files` gives, and whatever else is to be kept.
      step: Step after which the run is trained on this data.
      before: The record of the data before, which is kept as ``"before"``.
    """
    whole = record | {"from_step": step} | ({} if before is None else {"before": before})
    write_json(folder.data, whole)


def differences(before: Entry, now: Entry) -> list[str]:
    """Differences between the data of two records, a phrase each; names of files are ignored."""
    return [text for split in SPLITS for text in _differences(split, before[split], now[split])]


def _differences(split: str, before: list[Entry], now: list[Entry]) -> list[str]:
    if len(before) != len(now):
        return [f"{split}: {_count(len(before))} then, {_count(len(now))} now"]
    found = []
    for old, new in zip(before, now, strict=True):
        for name, unit in (("bytes", " bytes"), ("sha256", ""), ("weight", "")):
            if old.get(name) != new.get(name):
                found.append(
                    f"{split}: {old['file']} had {_show(name, old)}{unit} then, and {new['file']} "
                    f"has {_show(name, new)}{unit} now"
                )
                break
    return found


def _show(name: str, entry: Entry) -> str:
    value = entry.get(name)
    if name == "bytes":
        return f"{value:,}"
    return f"SHA-256 {str(value)[:12]}..." if name == "sha256" else f"weight {value}"


def _count(number: int) -> str:
    return f"{number} file" if number == 1 else f"{number} files"


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FastaError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
