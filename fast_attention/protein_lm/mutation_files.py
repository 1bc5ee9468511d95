"""Lists of mutations, as files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

_MUTANT, _ID = "mutant", "id"


class ListedMutation(NamedTuple):
    """One entry of a list.

    Attributes:
      text: The mutation, in the notation of `mutations`.
      id: Of the wild type, where the list says that.
      line: Where it stands.
    """

    text: str
    id: str | None
    line: int


def read_mutations(path: str | Path) -> list[ListedMutation]:
    """Reads a list of mutations: one per line, or a table with a column ``mutant``.

    The file is a table if its first line that is not empty, cut at tabs if it has any and else at
    commas, has a cell ``mutant``; that line is its header then. In a table the column ``id``,
    if there is one, names the wild type by its id in the FASTA file; other columns are not looked
    at (tables of ProteinGym can be given as they are). Otherwise every line that is not empty is
    a mutation, the first one, too.

    Args:
      path: The file, text.

    Raises:
      ValueError: If it has no mutation, or a line of a table ends before its mutation.
      OSError: If it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text ({error.reason}); give a list or a table") from None
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise ValueError(f"{path}: the file is empty; give one mutation per line, such as A12G")
    delimiter = "\t" if "\t" in lines[first] else ","
    header = [
        cell.strip().lower() for cell in next(csv.reader([lines[first]], delimiter=delimiter))
    ]
    if _MUTANT not in header:
        return [
            ListedMutation(line.strip(), None, number)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    found = []
    rows = csv.reader(io.StringIO("\n".join(lines[first + 1 :])), delimiter=delimiter)
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        line = first + 1 + rows.line_num
        cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
        if not cells.get(_MUTANT):
            raise ValueError(f"{path}, line {line}: nothing in the column {_MUTANT!r}")
        found.append(ListedMutation(cells[_MUTANT], cells.get(_ID), line))
    if not found:
        raise ValueError(f"{path}: the table has a header and no mutation")
    return found
