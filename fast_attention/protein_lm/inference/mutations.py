"""Mutations of a protein: how they are written, and what they make of it.

Positions count from 1, and name the residue of the wild type that must stand there.

| written | meaning |
| --- | --- |
| ``A12G`` | A at 12 becomes G |
| ``A12G:L40P``, ``A12G,L40P`` | both |
| ``A12del``, ``del12`` | A at 12 is deleted |
| ``A12_L14del``, ``del12_14`` | 12 to 14 are deleted |
| ``A12_L13insGS`` | GS is inserted between 12 and 13 |
| ``A12delinsGS``, ``A12_L14delinsGS`` | GS takes the place of 12, or of 12 to 14 |
| ``WT`` | nothing changes |

Indels are written as the HGVS recommends (https://hgvs-nomenclature.org), with one-letter residues.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fast_attention.protein_lm.data.alphabet import FASTA_SYMBOLS
from fast_attention.protein_lm.data.alphabets import PROTEIN

# Digits are positions, and the others separate.
_RESIDUE = f"[{re.escape(''.join(set(FASTA_SYMBOLS) - set('0123456789:,_')))}]"
# Python does not read numbers of thousands of digits.
_POSITION = r"(\d{1,15})"
_SUBSTITUTION = re.compile(rf"({_RESIDUE}){_POSITION}({_RESIDUE})")
_INDEL = re.compile(
    rf"({_RESIDUE}){_POSITION}(?:_({_RESIDUE}){_POSITION})?(del|ins|delins)({_RESIDUE}*)"
)
_BARE_DELETION = re.compile(rf"del{_POSITION}(?:_{_POSITION})?")
_FORMS = "A12G, A12del, del12, A12_L14del, A12_L13insGS, A12delinsGS, several joined by ':' or ','"


class Edit(NamedTuple):
    """One change.

    Attributes:
      start: The first residue that is replaced, from 0 on.
      end: The first one behind them; `start` if nothing is.
      residues: What takes their place.
    """

    start: int
    end: int
    residues: str


class Variant(NamedTuple):
    """How a protein differs from its wild type.

    Attributes:
      name: As it was written.
      edits: What changes, in the order of the protein, substitutions one by one and none of them
        without effect; empty for the wild type itself.
    """

    name: str
    edits: tuple[Edit, ...]

    @property
    def growth(self) -> int:
        """How many residues it has more than the wild type."""
        return sum(len(edit.residues) - (edit.end - edit.start) for edit in self.edits)

    def apply(self, wild_type: str) -> str:
        """What comes of the wild type."""
        parts, done = [], 0
        for start, end, residues in self.edits:
            parts += [wild_type[done:start], residues]
            done = end
        return "".join([*parts, wild_type[done:]])

    @property
    def substitutes_only(self) -> bool:
        """Whether every residue keeps its place."""
        return all(edit.end - edit.start == len(edit.residues) for edit in self.edits)

    @property
    def substitutions(self) -> list[tuple[int, str]]:
        """Place, from 0 on, and new residue of all that changes, where `substitutes_only`."""
        return [(edit.start, edit.residues) for edit in self.edits]


def parse_variant(text: str, wild_type: str) -> Variant:
    """Reads a mutation, or several of one variant.

    Args:
      text: In the notation of this module; lower case is accepted for residues of substitutions.
      wild_type: The protein, in upper case.

    Raises:
      ValueError: If it cannot be read, does not fit the wild type, changes a residue twice, or
        leaves nothing.
    """
    name = text.strip()
    if name.upper() == "WT":
        return Variant(name, ())
    edits = sorted(_parse_edit(part.strip(), name, wild_type) for part in re.split("[:,]", name))
    for before, after in zip(edits, edits[1:], strict=False):
        if after.start < before.end or after[:2] == before[:2]:
            raise ValueError(
                f"{name}: position {after.start + 1} is changed twice; write one change for it"
            )
    return _variant(name, edits, wild_type)


def variant_of(name: str, sequence: str, wild_type: str) -> Variant:
    """The variant that a whole sequence is.

    Of equal length, the sequences are compared residue by residue. Otherwise what lies between
    their common beginning and their common end is one change.
    """
    if len(sequence) == len(wild_type):
        pairs = enumerate(zip(wild_type, sequence, strict=True))
        edits = [Edit(place, place + 1, new) for place, (old, new) in pairs if old != new]
        return Variant(name, tuple(edits))
    shorter = min(len(sequence), len(wild_type))
    start = _common(wild_type[:shorter], sequence[:shorter])
    behind = _common(wild_type[::-1][: shorter - start], sequence[::-1][: shorter - start])
    edit = Edit(start, len(wild_type) - behind, sequence[start : len(sequence) - behind])
    return Variant(name, (edit,))


def all_substitutions(
    wild_type: str, places: Iterable[int] | None = None, residues: str = PROTEIN.standard_symbols
) -> list[Variant]:
    """Every substitution by another residue.

    Args:
      wild_type: The protein.
      places: Where, from 0 on; None is everywhere.
      residues: By which, such as `Alphabet.standard_symbols` of a model with another alphabet.
    """
    return list(iterate_substitutions(wild_type, places, residues))


def iterate_substitutions(
    wild_type: str, places: Iterable[int] | None = None, residues: str = PROTEIN.standard_symbols
) -> Iterator[Variant]:
    """Yields what `all_substitutions` returns, one by one."""
    for place in range(len(wild_type)) if places is None else places:
        for residue in residues:
            if residue != wild_type[place]:
                name = f"{wild_type[place]}{place + 1}{residue}"
                yield Variant(name, (Edit(place, place + 1, residue),))


def is_notation(text: str) -> bool:
    """Whether a text is written as mutations are, whatever the wild type; see this module."""
    parts = [part.strip() for part in re.split("[:,]", text)]
    return text.strip().upper() == "WT" or all(
        _SUBSTITUTION.fullmatch(part.upper())
        or _INDEL.fullmatch(part)
        or _BARE_DELETION.fullmatch(part)
        for part in parts
    )


def parse_positions(text: str, length: int) -> list[int]:
    """Reads positions such as ``10-50,60``; returns them from 0 on, in order, each once.

    Raises:
      ValueError: If they cannot be read, or do not lie in a protein of `length` residues.
    """
    places: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(rf"\s*{_POSITION}\s*(?:-\s*{_POSITION}\s*)?", part)
        if found is None:
            raise ValueError(
                f"positions {text[:60]!r}: expected ranges such as 10-50,60, got {part[:60]!r}"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if not 1 <= first <= last <= length:
            raise ValueError(
                f"positions {text!r}: {part.strip()} does not lie within 1-{length}, the residues "
                "of the protein"
            )
        places.update(range(first - 1, last))
    return sorted(places)


def _parse_edit(text: str, name: str, wild_type: str) -> Edit:
    whole = name if name == text else f"{name}: {text}"
    if found := _SUBSTITUTION.fullmatch(text.upper()):
        place = _place(found[1], found[2], whole, wild_type)
        return Edit(place, place + 1, found[3])
    if found := _BARE_DELETION.fullmatch(text):
        first = _place("", found[1], whole, wild_type)
        last = first if found[2] is None else _place("", found[2], whole, wild_type)
        return _deletion(first, last, "", whole)
    if found := _INDEL.fullmatch(text):
        first = _place(found[1], found[2], whole, wild_type)
        last = first if found[4] is None else _place(found[3], found[4], whole, wild_type)
        kind, residues = found[5], found[6]
        if (kind == "del") == bool(residues):
            say = "no residues, or 'delins' before them" if residues else "the new residues"
            raise ValueError(f"{whole}: expected {say} after {kind!r}")
        if kind != "ins":
            return _deletion(first, last, residues, whole)
        if last != first + 1:
            raise ValueError(
                f"{whole}: an insertion lies between two neighbours, such as A12_L13insGS"
            )
        return Edit(last, last, residues)
    raise ValueError(f"{whole[:60]!r} is not a valid mutation; expected one such as {_FORMS}")


def _deletion(first: int, last: int, residues: str, whole: str) -> Edit:
    if last < first:
        raise ValueError(f"{whole}: position {last + 1} does not come after {first + 1}")
    return Edit(first, last + 1, residues)


def _place(residue: str, position: str, whole: str, wild_type: str) -> int:
    place = int(position) - 1
    if not 0 <= place < len(wild_type):
        raise ValueError(
            f"{whole}: the wild type has no position {position}; it has {len(wild_type)} residues, "
            "counted from 1"
        )
    if residue and wild_type[place] != residue:
        raise ValueError(
            f"{whole}: the wild type has {wild_type[place]} at position {position}, and not "
            f"{residue}; check the numbering and the sequence"
        )
    return place


def _variant(name: str, edits: Sequence[Edit], wild_type: str) -> Variant:
    effective = [part for edit in edits for part in _effective(edit, wild_type)]
    variant = Variant(name, tuple(effective))
    if variant.growth == -len(wild_type):
        raise ValueError(f"{name} deletes the whole protein: leave at least one residue")
    return variant


def _effective(edit: Edit, wild_type: str) -> list[Edit]:
    """The edit, residue by residue where these keep their places, without what changes nothing."""
    start, end, residues = edit
    if end - start != len(residues):
        return [edit]
    return [
        Edit(place, place + 1, residue)
        for place, residue in enumerate(residues, start)
        if residue != wild_type[place]
    ]


def _common(one: str, two: str) -> int:
    """How many residues two sequences of equal length have in common at their beginnings."""
    pairs = enumerate(zip(one, two, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(one))
