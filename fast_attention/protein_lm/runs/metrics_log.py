"""The record of a run: ``metrics.jsonl`` and TensorBoard, without duplicates after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import tensorboardX

from fast_attention.protein_lm.distributed import processes
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import read_bounded
from fast_attention.protein_lm.files.output_files import json_text, write_file
from fast_attention.protein_lm.runs.run_folder import RunFolder

Row = dict[str, Any]

_MAX_BYTES = 2**30


class MetricsLog:
    """Appends rows to both records; made by `open_metrics_log`."""

    def __init__(self, lines: TextIO, board: tensorboardX.SummaryWriter):
        """Takes what it writes to: an open ``metrics.jsonl`` and a TensorBoard writer."""
        self._lines = lines
        self._board = board

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one row: figures of `split` after `step` steps.

        Raises:
          RunError: If it cannot be written.
        """
        try:
            self._lines.write(json_text({"step": step, "split": split, **values}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise RunError(
                f"{self._lines.name} cannot be written to ({error.strerror}): check whether the "
                "disk is full. Checkpoints are unchanged, and the same command resumes from the "
                "last one"
            ) from error
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{split}/{name}", value, step)
        self._board.flush()


class SilentLog:
    """The log of a process that does not write, beside the one that does."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Does nothing."""


@contextmanager
def open_metrics_log(folder: RunFolder, step: int) -> Iterator[MetricsLog | SilentLog]:
    """Opens the records of a run that continues after `step`.

    Rows of later steps, left by a run that was killed after its last checkpoint, are dropped, and
    so is a last line that was not written to its end.

    Args:
      folder: The run's.
      step: Step of the checkpoint that training continues from; 0 starts from the beginning.

    Yields:
      The log; of several processes, only the first writes.
    """
    if not processes.is_primary():
        yield SilentLog()
        return
    kept = [row for row in read_metrics(folder.metrics) if row["step"] <= step]
    write_file(folder.metrics, "".join(json_text(row) + "\n" for row in kept))
    board = tensorboardX.SummaryWriter(str(folder.tensorboard), purge_step=step + 1)
    with open(folder.metrics, "a", encoding="utf-8") as lines:
        try:
            yield MetricsLog(lines, board)
        finally:
            board.close()


def read_metrics(path: Path) -> list[Row]:
    """Reads the whole lines of ``metrics.jsonl``; a missing file has none.

    Raises:
      RunError: If a line is damaged.
    """
    if not path.exists():
        return []
    content = read_bounded(path, _MAX_BYTES)
    whole = content[: content.rfind(b"\n") + 1]
    return [_row(path, number, line) for number, line in enumerate(whole.splitlines(), 1)]


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        others = [value for name, value in row.items() if name != "split"]
        if (
            type(row["step"]) is int
            and isinstance(row["split"], str)
            and all(value is None or type(value) in (int, float) for value in others)
        ):
            return row
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise RunError(
        f"{path}, line {number} is damaged: remove that line (training needs none of them), or "
        "fetch the file again from where the folder was copied"
    )
