"""Records that were left out: counted, and listed on request."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from fast_attention.protein_lm.files.tables import Write, open_table
from fast_attention.protein_lm.wording import counted

_SHOWN = 10
_COLUMNS = {"path": str, "line": int, "id": str, "reason": str}


class SkippedRecord(NamedTuple):
    """One record that was left out.

    Attributes:
      path: of its file.
      line: where the trouble is.
      id: of the record.
      reason: what was found and expected.
    """

    path: str
    line: int
    id: str
    reason: str


class SkippedRecords:
    """What was left out of some input: pass it to `read_proteins`, then report it at the end.

    Attributes:
      count: how many records were left out.
      total: how many there were, those that were read included.
      records: the first of them.
    """

    def __init__(self, *, keep: int | None = _SHOWN, write: Write | None = None):
        """Nothing is left out so far.

        Args:
          keep: how many are kept in ``records``, the others are only counted; None keeps all.
          write: takes each record, as a row of the table that `list_skipped` opens.
        """
        self.count = 0
        self.total = 0
        self.records: list[SkippedRecord] = []
        self._keep = keep
        self._write = write

    def add(self, record: SkippedRecord) -> None:
        """Counts and lists a record."""
        self.count += 1
        if self._keep is None or len(self.records) < self._keep:
            self.records.append(record)
        if self._write is not None:
            self._write(record)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the records that were kept, as `list_skipped` writes all of them."""
        with open_table(path, _COLUMNS) as write:
            for record in self.records:
                write(record)

    def summary(self) -> str:
        """Says how many were left out, and the first of them; empty if none was."""
        if not self.count:
            return ""
        verb = "was" if self.count == 1 else "were"
        lines = [f"{self.count:,} of {counted(self.total, 'record')} {verb} left out:"]
        lines += [
            f"  {entry.path}, line {entry.line}: record {entry.id!r} {entry.reason}"
            for entry in self.records[:_SHOWN]
        ]
        if self.count >= len(lines):
            lines.append(f"  and {self.count - len(lines) + 1} more")
        return "\n".join(lines)


def tell(skipped: SkippedRecords) -> None:
    """Prints to stderr what was left out, if anything was."""
    if skipped.count:
        print(skipped.summary(), file=sys.stderr)


@contextlib.contextmanager
def list_skipped(path: str | os.PathLike[str] | None) -> Iterator[SkippedRecords]:
    """Gives a collector whose records are all written to a table, a row each.

    Args:
      path: the table (path, line, id, reason), see `tables.open_table`. None writes none.
    """
    if path is None:
        yield SkippedRecords()
        return
    with open_table(path, _COLUMNS) as write:
        yield SkippedRecords(write=write)
