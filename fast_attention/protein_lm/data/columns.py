"""Reading named columns of a table of text, CSV or TSV, plain or gzip."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fast_attention.protein_lm.data.fasta_parser import CONTROLS
from fast_attention.protein_lm.data.table_rows import cell_count, parse_rows, read_lines
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.wording import counted

MOST_BYTES = 2**29
"""Bytes of the largest table that is read, unpacked."""

Columns = dict[str, list[str]]


def read_columns(
    path: str | os.PathLike[str],
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> tuple[Columns, list[int]]:
    """Reads some columns of a table whose first line names them.

    See `table_rows` for what a table may be. A name is also found where only its case differs.

    Args:
      path: The file.
      required: Names that must be there.
      optional: Names that are read where they are there.
      flags: The option that names a column, by the name of the column.

    Returns:
      Lists of equal length by name; without any names all columns, in the order of the file. And
      the line in which each row ends, from 1.

    Raises:
      RunError: If the file cannot be read, lacks a column or has no rows, names a column twice,
        or has a row of another number of cells.
    """
    path = Path(path)
    try:
        numbered = list(parse_rows(path, read_lines(path, most_bytes=MOST_BYTES)))
    except FastaError as error:
        raise RunError(str(error)) from error
    if len(numbered) < 2:
        raise RunError(
            f"{path}: expected a first line with the names of columns, and rows below it; the "
            f"file has {counted(len(numbered), 'row')}"
        )
    first, names = numbered[0]
    for number, row in numbered[1:]:
        if len(row) != len(names):
            raise RunError(f"{path}, line {number}: {'. '.join(cell_count(len(row), len(names)))}")
    if not required and not optional:
        required = names
    places = {}
    for name in dict.fromkeys([*required, *optional]):
        found = [place for place, other in enumerate(names) if other == name] or [
            place for place, other in enumerate(names) if other.lower() == name.lower()
        ]
        if len(found) > 1:
            raise RunError(
                f"{path}, line {first}: {len(found)} columns are named {name!r}; rename one"
            )
        if found:
            places[name] = found[0]
        elif name in required:
            raise RunError(_no_column(path, first, name, names, (flags or {}).get(name)))
    columns = {name: [row[place] for _, row in numbered[1:]] for name, place in places.items()}
    return columns, [number for number, _ in numbered[1:]]


def _no_column(path: Path, line: int, name: str, names: Sequence[str], flag: str | None) -> str:
    how = f" with {flag}" if flag else ""
    return (
        f"{path}, line {line}: there is no column {name!r}, only {', '.join(map(repr, names))}; "
        f"name the column{how}, or put its name into the first line"
    )


def check_name(text: str) -> str:
    """Returns a name (an id, a label, a group) that fits in one cell of any table.

    Raises:
      ValueError: If it has a tab, a line end or another control character.
    """
    control = next((letter for letter in text if ord(letter) in CONTROLS), None)
    if control is not None:
        raise ValueError(f"{text[:80]!r} has the control character {control!r}: replace it")
    return text
