"""The rows and the columns of a table of text, CSV or TSV: the reader of every table of a command.

Cells are separated by tabs where the first line has one, otherwise by commas or semicolons,
whichever it has more of. Cells may be quoted as in RFC 4180. Any line ends, a byte order mark and
blank lines are accepted, plain or compressed with gzip; blanks around cells are dropped.

A table of proteins takes the place of a FASTA file. A first line with a cell ``sequence`` names the
columns: the id is in the column ``id``, or else in the first of the others. Without such a line a
row is an id and a sequence, the form in which Google's protein_lm took its data.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fast_attention.protein_lm.data.fasta_parser import (
    CONTROLS,
    MAX_HEADER,
    MAX_RESIDUES,
    BadRecord,
    FastaRecord,
    RecordRules,
    make_record,
)
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.text_source import FastaError, read_pieces
from fast_attention.protein_lm.wording import counted

EXTENSIONS = (".csv", ".tsv")
"""What makes a file a table, in lower or upper case, with or without ``.gz``."""

LONGEST_LINE = MAX_RESIDUES + MAX_HEADER
"""Bytes of the longest line: a longer record is reported by its id up to this length."""

MOST_BYTES = 2**29
"""Bytes of the largest table that is read, unpacked."""

Row = tuple[int, list[str]]
Columns = dict[str, list[str]]


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a table, see `parse_rows`.

    Raises:
      FastaError: As `read_lines` and `parse_rows`.
    """
    return parse_rows(path, read_lines(path))


def read_lines(path: Path, *, most_bytes: int | None = None) -> Iterator[str]:
    r"""Yields the lines of a file, each with its ``\n``; only one is in memory.

    Args:
      path: The file: UTF-8, or UTF-16 or UTF-32 with a byte order mark.
      most_bytes: A larger file, unpacked, is an error; None reads a file of any size.

    Raises:
      FastaError: If the file cannot be read, is larger, has a NUL byte, another encoding or a line
        of more than `LONGEST_LINE` bytes.
    """
    rest, number, size = b"", 1, 0
    for piece in read_pieces(path):
        size += len(piece)
        if most_bytes is not None and size > most_bytes:
            raise FastaError(
                f"{path} has more than {most_bytes:,} bytes, and tables are read into memory: "
                "check that it is the right file, or split it."
            )
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield _decode(path, number, line) + "\n"
            number += 1
        if len(rest) > LONGEST_LINE:
            begin = rest[:40].decode(errors="replace")
            raise FastaError(
                f"{path}, line {number}: the line that begins with {begin!r} is longer than "
                f"{LONGEST_LINE:,} bytes. Check that it is a table of proteins."
            )
    if rest:
        yield _decode(path, number, rest) + "\n"


def _decode(path: Path, number: int, line: bytes) -> str:
    if b"\0" in line:
        raise FastaError(
            f"{path}, line {number}: has a NUL byte. Save the table as plain text, UTF-8."
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        before = line[max(0, error.start - 20) : error.start].decode(errors="replace")
        raise FastaError(
            f"{path}, line {number}: the byte {line[error.start]:#04x} after {before!r} is not "
            "UTF-8. Save the table as text with the encoding UTF-8 (in a spreadsheet: 'CSV UTF-8')."
        ) from None


def parse_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """Yields the rows of a table that are not blank.

    Args:
      path: The file, for errors.
      lines: Its lines.

    Yields:
      The line in which a row ends, from 1, and its cells.

    Raises:
      FastaError: If a quotation mark is not closed, or text follows a closing one.
    """
    lines, head = iter(lines), list[str]()
    for line in lines:
        head.append(line)
        if line.strip():
            break
    # The limit of the module is for all of its readers.
    csv.field_size_limit(LONGEST_LINE)
    rows = csv.reader(
        itertools.chain(head, lines),
        delimiter=find_separator(head[-1] if head else ""),
        strict=True,
    )
    begin = 1
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield rows.line_num, cells
            begin = rows.line_num + 1
    except csv.Error as error:
        raise FastaError(
            f"{path}, line {begin}: is not a valid table: the row that begins here could not be "
            f"read up to line {rows.line_num} ({error}). Close each quotation mark, and double "
            "those inside a "
            "quoted cell."
        ) from error


def find_separator(line: str) -> str:
    """What separates the cells of a table whose first line this is."""
    return "\t" if "\t" in line else max(",", ";", key=line.count)


def cell_count(found: int, expected: int) -> tuple[str, str]:
    """What is wrong with a row of another number of cells than the first line has, and a remedy."""
    return (
        f"has {counted(found, 'cell')}, but the first line has {expected}",
        "Quote cells that contain the separator, and write decimals with a point.",
    )


def read_columns(
    path: str | os.PathLike[str],
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> tuple[Columns, list[int]]:
    """Reads some columns of a table whose first line names them.

    A name is also found where only its case differs.

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


def is_table(path: Path) -> bool:
    """Whether the name of a file is that of a table."""
    return path.name.lower().removesuffix(".gz").endswith(EXTENSIONS)


def scan_table(path: Path, rules: RecordRules) -> Iterator[tuple[int, FastaRecord | BadRecord]]:
    """Yields every record of a table; the arguments are those of `fasta_parser.scan_fasta`.

    Yields:
      The line in which the row ends, and the record.

    Raises:
      FastaError: If the file as a whole cannot be read: missing, empty, cut off, no table, or
        without a column of sequences.
    """
    width, id_place, sequence_place, num_rows = 0, 0, 1, 0
    for line, cells in read_rows(path):
        if not width:
            width = len(cells)
            names = [cell.lower() for cell in cells]
            if "sequence" in names:
                id_place, sequence_place = _places(path, line, names)
                continue
            if width != 2:
                raise FastaError(
                    f"{path}, line {line}: expected the names of the columns, one of them "
                    f"'sequence', or two cells, an id and a sequence; got {width} cells. Name the "
                    "columns in the first line."
                )
        num_rows += 1
        if len(cells) != width:
            yield line, BadRecord(line, cells[0][:200], *cell_count(len(cells), width))
            continue
        name = cells[id_place] if id_place != sequence_place else ""
        yield line, make_record(rules, name, cells[sequence_place], line)
    if not num_rows:
        raise FastaError(f"{path}: the table is empty. Give one with at least one protein.")


def _places(path: Path, line: int, names: list[str]) -> tuple[int, int]:
    if names.count("sequence") > 1 or names.count("id") > 1:
        raise FastaError(f"{path}, line {line}: two columns have the same name: rename one.")
    sequence = names.index("sequence")
    others = [place for place in range(len(names)) if place != sequence]
    first = others[0] if others else sequence
    return (names.index("id") if "id" in names else first), sequence
