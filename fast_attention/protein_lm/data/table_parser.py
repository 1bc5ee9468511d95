"""From a table of proteins, CSV or TSV, to the records of a FASTA file, one by one.

See `table_rows` for what a table may be. A first line with a cell ``sequence`` names the columns:
the id is in the column ``id``, or else in the first of the others. Without such a line a row is an
id and a sequence, the form in which Google's protein_lm took its data.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fast_attention.protein_lm.data.fasta_parser import (
    BadRecord,
    FastaRecord,
    RecordRules,
    make_record,
)
from fast_attention.protein_lm.data.table_rows import cell_count, read_rows
from fast_attention.protein_lm.files.text_source import FastaError

EXTENSIONS = (".csv", ".tsv")
"""What makes a file a table, in lower or upper case, with or without ``.gz``."""


def is_table(path: Path) -> bool:
    """Whether the name of a file says that it is a table."""
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
        raise FastaError(f"{path}, line {line}: two columns have one name: rename one.")
    sequence = names.index("sequence")
    others = [place for place in range(len(names)) if place != sequence]
    first = others[0] if others else sequence
    return (names.index("id") if "id" in names else first), sequence
