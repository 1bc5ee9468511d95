"""Which proteins belong together, and error bars that respect it.

Relatives are predicted alike, well or badly, so that a file of a thousand proteins may be worth a
hundred independent ones. A standard error is therefore taken over groups (Cochran, Sampling
Techniques, 1977, section 9A: the ratio of sums over clusters).

Shape letters: N proteins, G groups.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.data.table_rows import check_name, read_columns
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.wording import counted

_TOLD = 5


class Groups(NamedTuple):
    """A division of proteins.

    Attributes:
      name: What a group is called: ``"component"``, ``"family"``, ``"protein"``.
      labels: Names of the groups, sorted.
      of: int64 ``[N]``, the group of each protein.
    """

    name: str
    labels: list[str]
    of: np.ndarray


def make_groups(name: str, labels: Sequence[str]) -> Groups:
    """Divides proteins by equal labels."""
    # As objects: in an array of text, each would take the space of the longest.
    found, of = np.unique(np.array(list(map(str, labels)), object), return_inverse=True)
    return Groups(name, found.tolist(), of)


def read_groups(
    path: str | os.PathLike[str],
    ids: Sequence[str],
    *,
    key: str | None,
    value: str | None,
    name: str,
) -> Groups:
    """Looks up the groups of some proteins in a table.

    Args:
      path: A table, see `table_rows.read_columns`.
      ids: Of the proteins, as in their FASTA file. The table has either the whole id or, of an
        id such as ``sp|P12345|NAME``, the accession in the middle.
      key: The column with ids; None takes the first.
      value: The column with groups; None takes the second.
      name: What a group is called.

    Raises:
      RunError: If the table cannot be read or lacks some of the proteins.
    """
    names = [] if key is None or value is None else [key, value]
    table, lines = read_columns(path, names)
    if len(table) < 2:
        raise RunError(f"{path}: expected a column of ids and one of the {name}; got one")
    first, keys, values = list(table)[0], *list(table.values())[:2]
    places: dict[str, int] = {}
    for line, protein, label in zip(lines, keys, values, strict=True):
        try:
            if not check_name(label):
                raise ValueError("is empty")
        except ValueError as error:
            raise RunError(f"{path}, line {line}: the {name} {error}") from None
        if places.setdefault(protein, line) != line:
            raise RunError(
                f"{path}, line {line}: {protein!r} is also in line {places[protein]}; keep one row "
                "for each protein"
            )
    known = dict(zip(keys, values, strict=True))
    found = [known.get(protein, known.get(accession(protein))) for protein in ids]
    missing = [protein for protein, label in zip(ids, found, strict=True) if label is None]
    if missing:
        told = ", ".join(missing[:_TOLD]) + (", ..." if len(missing) > _TOLD else "")
        raise RunError(
            f"{path}: {len(missing)} of {counted(len(ids), 'protein')} not found in its column "
            f"{first!r}, which has ids such as {keys[0]!r}: {told}; the first line must name the "
            "columns; add a row for each protein, or leave the proteins out"
        )
    return make_groups(name, [label for label in found if label is not None])


def accession(protein: str) -> str:
    """The accession in an id such as ``sp|P12345|NAME``; another id itself."""
    parts = protein.split("|")
    return parts[1] if len(parts) == 3 else protein


def ratio_error(total: np.ndarray, weight: np.ndarray, groups: np.ndarray) -> float | None:
    r"""Standard error of ``R = sum(total) / sum(weight)`` over groups that were drawn as wholes.

    With ``e_g`` the sum of ``total - R weight`` over group g, that is

        sqrt(G / (G - 1) * sum_g e_g^2) / sum(weight).

    Args:
      total: float ``[N]``.
      weight: float ``[N]``.
      groups: int ``[N]``.

    Returns:
      The error, or None where there is one group only.
    """
    present, of = np.unique(groups, return_inverse=True)
    if len(present) < 2:
        return None
    residuals = np.bincount(of, total - total.sum() / weight.sum() * weight)
    spread = len(present) / (len(present) - 1) * (residuals**2).sum()
    return float(np.sqrt(spread) / weight.sum())
