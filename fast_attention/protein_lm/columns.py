"""Reading named columns of a table of text, CSV or TSV, plain or gzip."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fast_attention.protein_lm.fasta_parser import CONTROLS
from fast_attention.protein_lm.machine_failures import machine_failure
from fast_attention.protein_lm.run_folder import RunError

MOST_BYTES = 2**29
"""Bytes of the largest table that is read, unpacked."""

Columns = dict[str, list[str]]


def read_columns(
    path: str | os.PathLike[str], required: Sequence[str] = (), optional: Sequence[str] = ()
) -> Columns:
    """Reads some columns of a table, see `read_numbered_columns`."""
    return read_numbered_columns(path, required, optional)[0]


def read_numbered_columns(
    path: str | os.PathLike[str],
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> tuple[Columns, list[int]]:
    """Reads some columns of a table whose first line names them.

    Cells are separated by tabs where the first line has one, and by commas otherwise. Quoted
    cells, any line ends, a byte order mark and blank lines are accepted; blanks around cells are
    dropped.

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
    text = read_text(path)
    first = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in first else ",")
    try:
        numbered = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(row)]
    except csv.Error as error:
        raise RunError(f"{path}, line {rows.line_num}: no table ({error})") from error
    if len(numbered) < 2:
        raise RunError(
            f"{path}: expected a first line with the names of columns, and rows below it; the "
            f"file has {len(numbered)} lines that are not blank"
        )
    names = numbered[0][1]
    for name in required:
        if name not in names:
            flag = (flags or {}).get(name)
            how = f" with {flag}" if flag else ""
            raise RunError(
                f"{path}, line {numbered[0][0]}: there is no column {name!r}, only "
                f"{', '.join(map(repr, names))}; name the column{how}, or put its name into the "
                "first line"
            )
    wanted = [*required, *(name for name in optional if name in names)] or names
    for name in wanted:
        if names.count(name) > 1:
            raise RunError(f"{path}: {names.count(name)} columns are named {name!r}; rename one")
    for number, row in numbered[1:]:
        if len(row) != len(names):
            raise RunError(
                f"{path}, line {number}: {len(row)} cells, but the first line names {len(names)} "
                "columns; quote cells that hold the separator"
            )
    places = {name: names.index(name) for name in wanted}
    found = {name: [row[place] for _, row in numbered[1:]] for name, place in places.items()}
    return found, [number for number, _ in numbered[1:]]


def check_name(text: str) -> str:
    """Returns a name (an id, a label, a group) that fits in one cell of any table.

    Raises:
      ValueError: If it has a tab, a line end or another control character.
    """
    control = next((letter for letter in text if ord(letter) in CONTROLS), None)
    if control is not None:
        raise ValueError(f"{text[:80]!r} has the control character {control!r}: replace it")
    return text


def _read_bounded(path: Path) -> str:
    with open(path, "rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
            content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise RunError(
            f"{path} has more than {MOST_BYTES:,} bytes, and tables are read into memory: check "
            "that it is the right file, or split it"
        )
    return content.decode("utf-8-sig")


def read_text(path: Path) -> str:
    """The text of a table, plain or gzip.

    Raises:
      RunError: If it cannot be read, is damaged or no text, or has more than `MOST_BYTES` bytes.
    """
    try:
        return _read_bounded(path)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise RunError(f"{path}: is a folder; give the table in it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RunError(
            f"{path}: the compressed data is cut off or damaged ({error}); fetch the file again"
        ) from error
    except OSError as error:
        remedy = machine_failure(error) or "check the file"
        raise RunError(f"{path}: cannot be read ({error.strerror or error}): {remedy}") from error
    except UnicodeDecodeError:
        raise RunError(
            f"{path}: is no text; save a spreadsheet as CSV or TSV, encoded in UTF-8"
        ) from None
