"""From a table of proteins, CSV or TSV, to the records of a FASTA file, one by one.

Cells are separated by tabs where the name says TSV and by commas otherwise, and may be quoted. A
first line with a cell ``sequence`` names the columns: the id is in the column ``id``, or else in
the first of the others. Without such a line a row is an id and a sequence, the form in which
Google's protein_lm took its data.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from fast_attention.protein_lm.fasta_parser import (
    MAX_HEADER,
    MAX_RESIDUES,
    BadRecord,
    FastaRecord,
    RecordRules,
    make_record,
)
from fast_attention.protein_lm.text_source import FastaError, read_pieces

EXTENSIONS = (".csv", ".tsv")
"""What makes a file a table, in lower or upper case, with or without ``.gz``."""

# A longer record is told by its id, as far as lines of this length.
_LONGEST_LINE = MAX_RESIDUES + MAX_HEADER


def is_table(path: Path) -> bool:
    """Whether the name of a file says that it is a table."""
    return path.name.lower().removesuffix(".gz").endswith(EXTENSIONS)


def scan_table(
    path: Path,
    *,
    alphabet: str,
    replace: bool,
    max_residues: int,
    too_long: str | None = None,
) -> Iterator[tuple[int, FastaRecord | BadRecord]]:
    """Yields every record of a table; the arguments are those of `fasta_parser.scan_fasta`.

    Yields:
      The line in which the row ends, and the record.

    Raises:
      FastaError: If the file as a whole cannot be read: missing, empty, cut off, no table, or
        without a column of sequences.
    """
    rules = RecordRules(alphabet, replace, max_residues, too_long)
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    csv.field_size_limit(_LONGEST_LINE)
    rows = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    width, id_place, sequence_place, num_rows = 0, 0, 1, 0
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not width:
                width = len(cells)
                names = [cell.lower() for cell in cells]
                if "sequence" in names:
                    id_place, sequence_place = _places(path, rows.line_num, names)
                    continue
                if width != 2:
                    raise FastaError(
                        f"{path}, line {rows.line_num}: expected the names of the columns, one of "
                        f"them 'sequence', or two cells, an id and a sequence; got {width} cells. "
                        "Name the columns in the first line."
                    )
            num_rows += 1
            if len(cells) != width:
                reason = f"has {len(cells)} cells, where the first line has {width}"
                remedy = "Quote cells that hold the separator."
                yield rows.line_num, BadRecord(rows.line_num, cells[0][:200], reason, remedy)
                continue
            name = cells[id_place] if id_place != sequence_place else ""
            yield rows.line_num, make_record(rules, name, cells[sequence_place], rows.line_num)
    except csv.Error as error:
        raise FastaError(
            f"{path}, line {rows.line_num}: is no table ({error}). Save it as CSV or TSV."
        ) from error
    if not num_rows:
        raise FastaError(f"{path}: the table is empty. Give one with at least one protein.")


def _places(path: Path, line: int, names: list[str]) -> tuple[int, int]:
    if names.count("sequence") > 1 or names.count("id") > 1:
        raise FastaError(f"{path}, line {line}: two columns have one name: rename one.")
    sequence = names.index("sequence")
    others = [place for place in range(len(names)) if place != sequence]
    first = others[0] if others else sequence
    return (names.index("id") if "id" in names else first), sequence


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, each held in memory by itself."""
    rest, number = b"", 1
    for piece in read_pieces(path):
        if b"\0" in piece:
            number += piece.count(b"\n", 0, piece.index(b"\0"))
            raise FastaError(
                f"{path}, line {number}: has a NUL byte, which no text has. Save the table as "
                "plain text, UTF-8."
            )
        *whole, rest = (rest + piece).split(b"\n")
        number += len(whole)
        for line in whole:
            yield line.decode(errors="replace") + "\n"
        if len(rest) > _LONGEST_LINE:
            begin = rest[:40].decode(errors="replace")
            raise FastaError(
                f"{path}, line {number}: the line that begins with {begin!r} is longer than "
                f"{_LONGEST_LINE:,} bytes. Check that it is a table of proteins."
            )
    if rest:
        yield rest.decode(errors="replace")
