"""Proteins with a measured property: tables, and which of them are trained on.

Shape letters: N proteins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.alphabets import PROTEIN
from fast_attention.protein_lm.data.fasta_parser import MAX_RESIDUES
from fast_attention.protein_lm.data.table_rows import check_name, read_columns
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_files import printable
from fast_attention.protein_lm.wording import counted

TASKS = ("regression", "classification")
PARTS = ("train", "valid", "test")
_PART_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
} | dict.fromkeys(("valid", "validation", "val", "dev"), "valid")
_LEAST_ROWS = 8
_ABSENT = ("None", "nan", "NaT", "<NA>")
"""How values are written that stand for missing ones in Python, NumPy and pandas."""


class Labelled(NamedTuple):
    """Proteins with labels, all lists of length N.

    Attributes:
      ids: Names; numbers where the table has none.
      sequences: Residues, in upper case.
      labels: As in the table.
      parts: Of `PARTS`, or None where the table does not say.
      groups: Proteins of equal groups belong together, or None.
      left_out: What was left out, and why.
    """

    ids: list[str]
    sequences: list[str]
    labels: list[str]
    parts: list[str] | None
    groups: list[str] | None
    left_out: list[str]


def read_labelled(
    path: str | os.PathLike[str],
    *,
    sequence_column: str = "sequence",
    label_column: str = "label",
    id_column: str = "id",
    split_column: str | None = None,
    group_column: str | None = None,
    sequences: Mapping[str, str] | None = None,
    on_error: str = "raise",
    alphabet: Alphabet = PROTEIN,
    longest: int = MAX_RESIDUES,
    numeric: bool = False,
) -> Labelled:
    """Reads a table of proteins, see `table_rows.read_columns`.

    Args:
      path: The table.
      sequence_column: Its column of residues.
      label_column: Its column of labels.
      id_column: Its column of ids, needed with `sequences`.
      split_column: Its column that says train, valid or test; None looks for ``split``.
      group_column: Its column of families or the like.
      sequences: Residues by id, to be used instead of the column.
      on_error: What to do at a letter outside `alphabet`: ``"raise"``, ``"skip"`` the row, or
        ``"replace"`` the letter by that of the unknown residue. Rows without sequence, label
        or group are errors, too.
      alphabet: Its symbols may occur.
      longest: Most residues of a protein.
      numeric: Whether labels must be numbers; a row whose label is none is an error, too.

    Raises:
      RunError: If the table cannot be read or understood; the message names the row.
    """
    required = [label_column, *(name for name in (split_column, group_column) if name)]
    required.append(sequence_column if sequences is None else id_column)
    flags = {
        sequence_column: "--sequence_column",
        id_column: "--id_column",
        label_column: "--label_column",
        split_column or "": "--split_column",
        group_column or "": "--group_column",
    }
    table, lines = read_columns(path, list(dict.fromkeys(required)), [id_column, "split"], flags)
    number = len(table[label_column])
    ids = table.get(id_column) or [str(row) for row in range(1, number + 1)]
    splits = table.get(split_column or "split")
    kept, found, left_out = [], [], []
    for row in range(number):
        try:
            if not table[label_column][row]:
                raise ValueError(f"the column {label_column!r} (--label_column) is empty")
            if numeric:
                as_number(table[label_column][row])
            residues = (
                _lookup(sequences, ids[row])
                if sequences is not None
                else (table[sequence_column][row])
            )
            if len(residues) > longest:
                raise ValueError(
                    f"the sequence has more than {longest:,} residues; use the first N of each "
                    "with --max_length=N"
                )
            residues = _clean(residues, on_error, alphabet)
            if group_column and not table[group_column][row]:
                raise ValueError(
                    f"the column {group_column!r} (--group_column) is empty; a protein without "
                    "relatives needs a name of its own there"
                )
            for name in (id_column, label_column, group_column):
                if name in table:
                    check_name(table[name][row])
            found.append(residues)
            kept.append(row)
        except ValueError as error:
            told = f"line {lines[row]} ({printable(ids[row][:80])}): {error}"
            if on_error != "skip":
                raise RunError(
                    f"{path}, {told}; correct the row, or skip such rows with --on_error=skip"
                ) from None
            left_out.append(told)
    if not kept:
        raise RunError(f"{path}: no row is left; the first: {left_out[0]}")

    def pick(values: list[str]) -> list[str]:
        return [values[row] for row in kept]

    return Labelled(
        pick(ids),
        found,
        pick(table[label_column]),
        None
        if splits is None
        else [_part(f"{path}, line {lines[row]}", splits[row]) for row in kept],
        pick(table[group_column]) if group_column else None,
        left_out,
    )


def as_numbers(labels: Sequence[str | float]) -> np.ndarray:
    """Labels as float64 ``[N]``.

    Raises:
      RunError: At a label that is no finite number.
    """
    values = []
    for row, label in enumerate(labels, 1):
        try:
            values.append(as_number(label))
        except ValueError as error:
            raise RunError(f"label {row}: {error}") from None
    return np.array(values)


def as_number(label: str | float) -> float:
    """A label as a number.

    Raises:
      ValueError: If it is no finite number.
    """
    try:
        # Python reads 1_5 as 15, and other programs do not.
        value = math.nan if "_" in str(label) else float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        comma = "," in str(label)
        raise ValueError(
            f"the label {label!r} is not a finite number; "
            + ("write decimals with a point" if comma else "correct it")
            + ", or choose --task=classification (task='classification' in Python)"
        )
    return value


def as_names(labels: Sequence[Any], what: str) -> np.ndarray:
    """Names of classes or of groups as an array of strings ``[N]``, of Python objects.

    Args:
      labels: N of them.
      what: They are called in the error.

    Raises:
      RunError: If one is missing: empty, None, not a number.
    """
    names = [str(label) for label in labels]
    for row, (label, name) in enumerate(zip(labels, names, strict=True), 1):
        absent = not isinstance(label, str) and name in _ABSENT
        if absent or not name.strip():
            raise RunError(f"{what} {row} is missing ({label!r}): give it a name, or leave it out")
    # As objects: in an array of text, each would take the space of the longest.
    return np.array(names, object)


def choose_parts(
    number: int,
    parts: Sequence[str] | None,
    groups: Sequence[str] | None,
    *,
    test_share: float,
    valid_share: float,
    seed: int,
) -> np.ndarray:
    """Says which proteins are for training, validation and test.

    Without `parts` a share of the proteins is drawn for each; where `parts` has no ``valid``, a
    share of its ``train`` is. Proteins of a group are never separated by a draw.

    Args:
      number: N.
      parts: Of `PARTS`, or None.
      groups: Labels of groups, or None.
      test_share: Of all proteins.
      valid_share: Of those that are not for the test.
      seed: Of the draws.

    Returns:
      An array of strings ``[N]``.

    Raises:
      RunError: If there are too few proteins, or too few of a part, or a group is missing.
      ValueError: If a share is out of (0, 1).
    """
    for name, share in (("test_share", test_share), ("valid_share", valid_share)):
        if not 0 < share < 1:
            raise ValueError(f"{name} must be between 0 and 1; got {share}")
    for name, given in (("parts", parts), ("groups", groups)):
        if given is not None and len(given) != number:
            raise ValueError(
                f"{name} must have an entry for each of {counted(number, 'protein')}; got "
                f"{len(given)}"
            )
    unknown = sorted(set(parts or ()) - set(PARTS))
    if unknown:
        raise ValueError(f"parts must be {', '.join(PARTS)}; got {unknown[0]!r}")
    if number < _LEAST_ROWS:
        raise RunError(
            f"{counted(number, 'protein')}: too few to learn from; give at least {_LEAST_ROWS}"
        )
    labels = as_names(range(number) if groups is None else groups, "group")
    rng = np.random.default_rng([seed, 4])
    chosen = np.full(number, "train", dtype=object) if parts is None else np.array(parts, object)
    if parts is None:
        chosen[_draw(np.arange(number), labels, test_share, rng)] = "test"
    if "valid" not in chosen:
        chosen[_draw(np.flatnonzero(chosen == "train"), labels, valid_share, rng)] = "valid"
    counts = {part: int((chosen == part).sum()) for part in PARTS}
    if counts["train"] < 2 or not counts["valid"]:
        raise RunError(
            f"too few: {counted(counts['train'], 'protein')} to train on and {counts['valid']} to "
            "validate on; give more proteins, smaller shares, or smaller groups"
        )
    return chosen.astype(str)


def _draw(
    rows: np.ndarray, labels: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws whole groups that together hold about a share of some rows, and not more.

    A group that is larger than the share is not drawn: it would leave too little to train on. Where
    all groups are, the smallest one is drawn.
    """
    names, of, sizes = np.unique(labels[rows], return_inverse=True, return_counts=True)
    room = math.ceil(share * len(rows))
    fits = sizes <= room
    if not fits.all():
        # Beside a very large group, the others are all that is left to validate on.
        room = min(room, max(1, sizes[fits].sum() // 2))
    taken: list[int] = []
    order = rng.permutation(len(names))
    # The last group stays: something must be left to train on.
    for group in order[:-1]:
        if sizes[group] <= room:
            taken.append(group)
            room -= sizes[group]
    if not taken and len(names) > 1:
        taken.append(order[np.argmin(sizes[order])])
    return rows[np.isin(of, taken)]


def _lookup(sequences: Mapping[str, str], name: str) -> str:
    if name not in sequences:
        raise ValueError("no protein of this id in the FASTA file")
    return sequences[name]


def _clean(residues: str, on_error: str, alphabet: Alphabet) -> str:
    residues = "".join(residues.split()).upper().removesuffix("*")
    if not residues:
        raise ValueError("the sequence is empty")
    unknown = sorted(set(residues) - set(alphabet.symbols))
    letter = alphabet.unknown
    if unknown and on_error == "replace" and letter and all(map(str.isalpha, unknown)):
        return residues.translate({ord(strange): letter for strange in unknown})
    if unknown:
        raise ValueError(f"the sequence has {unknown[0]!r}, which is not one of {alphabet.symbols}")
    return residues


def _part(place: str, name: str) -> str:
    found = _PART_NAMES.get(name.lower())
    if found is None:
        raise RunError(
            f"{place}: the split {name!r} is not train, valid or test; rename it, or name "
            "the column of the split with --split_column"
        )
    return found
