"""Records that were left out: counted, and listed for whoever wants to know which."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TextIO

from fast_attention.protein_lm.output_files import printable, replacing

_SHOWN = 10


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
    """What was left out of some input; hand it to `read_proteins` and tell of it at the end.

    Attributes:
      count: how many records were left out.
      total: how many there were, those that were read included.
      records: the first of them.
    """

    def __init__(self, *, keep: int | None = _SHOWN, listing: TextIO | None = None):
        """Nothing is left out so far.

        Args:
          keep: how many are kept in ``records``, the others are only counted; None keeps all.
          listing: takes one line per record, a table with tabs; `list_skipped` opens one.
        """
        self.count = 0
        self.total = 0
        self.records: list[SkippedRecord] = []
        self._keep = keep
        self._listing = listing
        if listing is not None:
            listing.write(_row(SkippedRecord._fields))

    def add(self, record: SkippedRecord) -> None:
        """Counts and lists a record."""
        self.count += 1
        if self._keep is None or len(self.records) < self._keep:
            self.records.append(record)
        if self._listing is not None:
            self._listing.write(_row(record))

    def table(self) -> str:
        """The records that were kept, as the file of `list_skipped` has them."""
        return "".join(map(_row, [SkippedRecord._fields, *self.records]))

    def summary(self) -> str:
        """Says how many were left out, and the first of them; empty if none was."""
        if not self.count:
            return ""
        verb = "was" if self.count == 1 else "were"
        lines = [f"{self.count} of {self.total} records {verb} left out:"]
        lines += [
            f"  {entry.path}, line {entry.line}: record {entry.id!r} {entry.reason}"
            for entry in self.records[:_SHOWN]
        ]
        if self.count >= len(lines):
            lines.append(f"  and {self.count - len(lines) + 1} more")
        return "\n".join(lines)


@contextlib.contextmanager
def list_skipped(path: str | os.PathLike[str] | None) -> Iterator[SkippedRecords]:
    """Gives a collector whose records are all written to a file, one line each.

    The file appears when the ``with`` block has ended without an error.

    Args:
      path: the file, a table with tabs (path, line, id, reason); None writes none.
    """
    if path is None:
        yield SkippedRecords()
        return
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as raw,
        io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", newline="\n") as listing,
    ):
        yield SkippedRecords(listing=listing)


def _row(fields: Iterable[object]) -> str:
    return "\t".join(map(printable, map(str, fields))) + "\n"
