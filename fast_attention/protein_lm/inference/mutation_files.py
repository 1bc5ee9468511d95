"""Lists of mutations, as files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fast_attention.protein_lm.data.fasta import STDIN, FastaRecord
from fast_attention.protein_lm.data.table_rows import MOST_BYTES, cell_count, parse_rows, read_lines
from fast_attention.protein_lm.inference.mutations import Variant, is_notation, parse_variant

_MUTANT, _ID = "mutant", "id"


class ListedMutation(NamedTuple):
    """One entry of a list.

    Attributes:
      text: The mutation, in the notation of `mutations`.
      id: Of the wild type, where the list has it.
      line: Where it stands; 0 where there is no file.
    """

    text: str
    id: str | None
    line: int


def read_mutations(path: str | Path) -> list[ListedMutation]:
    """Reads a list of mutations: one per line, or a table with a column ``mutant``.

    Where there is no file of this name, the name itself is read as mutations between commas.

    The file is a table, see `table_rows`, if the first line that is not empty has a cell
    ``mutant``; that line is its header then. In a table the column ``id``, if there is one, names
    the wild type by its id in the FASTA file; other columns are not looked at (tables of ProteinGym
    can be given as they are). Otherwise every line that is not empty is a mutation, the first one,
    too.

    Args:
      path: The file, or ``-`` for standard input; text, plain or gzip, see `table_rows.read_lines`.

    Raises:
      ValueError: If it cannot be read, has no mutation, two columns of one name, or a row that does
        not have a cell for each column.
    """
    if path == "-":
        path = STDIN
    elif not os.path.exists(path):
        return _inline(str(path))
    path = Path(path)
    lines = list(read_lines(path, most_bytes=MOST_BYTES))
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ValueError(f"{path}: the file is empty; give one mutation per line, such as A12G")
    header = [cell.lower() for _, cells in parse_rows(path, [first]) for cell in cells]
    if _MUTANT not in header:
        return [
            ListedMutation(line.strip(), None, number)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    for name in (_MUTANT, _ID):
        if header.count(name) > 1:
            raise ValueError(f"{path}: {header.count(name)} columns are named {name!r}; rename one")
    found = []
    for line, cells in itertools.islice(parse_rows(path, lines), 1, None):
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {line}: {'. '.join(cell_count(len(cells), len(header)))}"
            )
        row = dict(zip(header, cells, strict=True))
        if not row[_MUTANT]:
            raise ValueError(f"{path}, line {line}: nothing in the column {_MUTANT!r}")
        found.append(ListedMutation(row[_MUTANT], row.get(_ID), line))
    if not found:
        raise ValueError(f"{path}: the table has a header and no mutation")
    return found


def _inline(text: str) -> list[ListedMutation]:
    """Mutations that are given in place of a file."""
    parts = [part.strip() for part in text.split(",")]
    unread = [part for part in parts if not is_notation(part)]
    if unread:
        raise ValueError(
            f"--mutations={text[:200]} is neither a file nor mutations: there is no such file, "
            f"and {unread[0][:60]!r} is not a mutation; check the path, or give mutations such as "
            "A12G,L40P:K41R"
        )
    return [ListedMutation(part, None, 0) for part in parts]


def variants_of_list(
    path: str | Path, wild_types: Sequence[FastaRecord]
) -> list[tuple[FastaRecord, list[Variant]]]:
    """Reads a list of mutations of some wild types.

    Args:
      path: As for `read_mutations`; where there is no such file, the mutations themselves,
        separated by commas: ``A12G,L40P:K41R`` is one of a residue and one of two.
      wild_types: With ids that differ.

    Returns:
      Each wild type that the list names, and its variants, both in the order of the list.

    Raises:
      ValueError: As `read_mutations` and `parse_variant`, with the line; or if the list does
        not say which of several wild types is meant, or names another.
    """
    by_id = {wild.id: wild for wild in wild_types}
    found: dict[str, list[Variant]] = {}
    for mutation in read_mutations(path):
        place = f"{path}, line {mutation.line}" if mutation.line else f"--mutations={path}"
        if mutation.id is None and len(wild_types) > 1:
            raise ValueError(
                f"{path}: there are {len(wild_types)} wild types, but the mutations name none: "
                "give a table with a column 'id', or one wild type"
            )
        name = wild_types[0].id if mutation.id is None else mutation.id
        if name not in by_id:
            known = ", ".join(list(by_id)[:5])
            raise ValueError(f"{place}: there is no wild type {name!r}; there is {known}")
        try:
            variant = parse_variant(mutation.text, by_id[name].sequence)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        found.setdefault(name, []).append(variant)
    return [(by_id[name], variants) for name, variants in found.items()]
