r"""From the text of a FASTA file to its records, one by one, in bounded memory.

A record begins at each line that begins with ``>``. Its id is the header up to the first blank.
Blanks, tabs and line ends inside a sequence mean nothing, lower case means the same as upper case,
and a ``*`` that ends a sequence is a translated stop codon and is dropped.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.alphabets import ALPHABETS
from fast_attention.protein_lm.files.formats import name_format
from fast_attention.protein_lm.files.text_source import FastaError, read_pieces

MAX_RESIDUES = 10_000_000
"""A longer record is an error wherever records are read."""

MAX_HEADER = 1_000_000
"""Bytes of the longest header that is read; those of NCBI's nr reach several hundred thousand."""

_BLANKS = b" \t\n\v\f"
_LETTERS = string.ascii_letters.encode()
# Controls and line ends of Unicode: they would break tables and terminals that show a header.
CONTROLS = dict.fromkeys([*range(32), *range(127, 160), 0x2028, 0x2029], " ")


class FastaRecord(NamedTuple):
    """One protein.

    Attributes:
      id: the header up to its first blank.
      description: the rest of the header.
      sequence: residues in upper case.
    """

    id: str
    description: str
    sequence: str


class BadRecord(NamedTuple):
    """A record that cannot be read.

    Attributes:
      line: where the trouble is.
      id: of the record.
      reason: what was found and expected.
      remedy: what to do.
    """

    line: int
    id: str
    reason: str
    remedy: str


def split_header(header: str) -> tuple[str, str]:
    """Id and description of a header, without its ``>``. Control characters count as blanks."""
    if not header.isprintable():
        header = header.translate(CONTROLS)
    name, _, description = " ".join(header.split(None, 1)).rstrip().partition(" ")
    return name, description


def scan_fasta(path: Path, rules: RecordRules) -> Iterator[tuple[int, FastaRecord | BadRecord]]:
    """Yields every record of a file, those that cannot be read as soon as that is known.

    Args:
      path: the file.
      rules: what a record may hold.

    Yields:
      The line of the record's header, and the record.

    Raises:
      FastaError: if the file as a whole cannot be read: missing, empty, cut off, no FASTA file, or
        with NUL bytes.
    """
    draft = None
    line, begins_line = 1, True
    for piece in read_pieces(path):
        parts = piece.split(b"\n>")
        for index, part in enumerate(parts):
            if index or (begins_line and part.startswith(b">")):
                if draft is not None and (found := draft.finish()):
                    yield draft.line, found
                draft = _Draft(rules, line)
                part = part if index else part[1:]
            if draft is not None:
                if b"\0" in part:
                    raise _nul(path, line + part.count(b"\n", 0, part.index(b"\0")))
                if bad := draft.add(part, line):
                    yield draft.line, bad
            elif part.strip():
                raise _no_fasta(path, line, part)
            line += part.count(b"\n") + (index < len(parts) - 1)
        if piece:
            begins_line = piece.endswith(b"\n")
    if draft is None:
        raise FastaError(f"{path}: the file is empty. Give a FASTA file with at least one protein.")
    if found := draft.finish():
        yield draft.line, found


class RecordRules:
    """What a record may hold."""

    def __init__(
        self,
        alphabet: Alphabet,
        *,
        marks: str = "",
        replace: bool = False,
        max_residues: int = MAX_RESIDUES,
        too_long: str | None = None,
    ):
        """Says what may occur.

        Args:
          alphabet: its `Alphabet.symbols` may occur.
          marks: other symbols that may occur.
          replace: whether other letters are taken for the unknown residue.
          max_residues: a longer record is bad; what of it is held in memory is not more.
          too_long: the remedy for a longer record; None takes a general one.
        """
        self.symbols = "".join(sorted(alphabet.symbols + marks))
        self.unknown = alphabet.unknown
        allowed = (self.symbols + self.symbols.lower()).encode()
        self.passing = allowed + _LETTERS if replace else allowed
        self.max_residues = max_residues
        self.too_long = too_long or "Check that each protein has its own header."
        unknown = bytes(letter for letter in _LETTERS if letter not in allowed)
        letter = (self.unknown or "").encode()
        self.replacements = bytes.maketrans(unknown, letter * len(unknown)) if replace else None


def make_record(
    rules: RecordRules, header: str, residues: str, line: int
) -> FastaRecord | BadRecord:
    """Makes a record of a header and residues that stand in one line of a file."""
    draft = _Draft(rules, line)
    header = header.replace("\n", " ")
    bad = draft.add(f"{header}\n{residues}".encode(), line - 1)
    found = bad or draft.finish()
    assert found is not None, "a draft that is not bad becomes a record"
    return found


class _Draft:
    """The record that is being read."""

    def __init__(self, rules: RecordRules, line: int):
        self.line = line
        self._rules = rules
        self._header, self._in_header = b"", True
        self._sequence: list[bytes] = []
        self._size = 0
        self._stop: int | None = None
        self._is_bad = False

    def add(self, part: bytes, line: int) -> BadRecord | None:
        """Takes the next bytes of the record, the first of which are in `line`."""
        if self._is_bad:
            return None
        if self._in_header:
            header, ended, part = part.partition(b"\n")
            self._header += header
            if len(self._header) > MAX_HEADER:
                return self._bad(
                    line, f"has a header of more than {MAX_HEADER} bytes", "Shorten the header."
                )
            if not ended:
                return None
            self._in_header = False
            line += 1
        residues = part.translate(None, _BLANKS)
        if residues and self._stop is not None:
            return self._bad_symbol(self._stop, "*")
        strange = residues.translate(None, self._rules.passing)
        if strange:
            place = part.index(strange[:1])
            line += part.count(b"\n", 0, place)
            if strange != b"*" or not residues.endswith(b"*"):
                return self._bad_symbol(line, part[place : place + 4].decode(errors="replace")[0])
            self._stop, residues = line, residues[:-1]
        self._size += len(residues)
        if self._size > self._rules.max_residues:
            return self._bad(
                self.line,
                f"has more than {self._rules.max_residues:,} residues",
                self._rules.too_long,
            )
        self._sequence.append(residues)
        return None

    def finish(self) -> FastaRecord | BadRecord | None:
        """The record, or None if it was found bad before."""
        if self._is_bad:
            return None
        if not self._size:
            return self._bad(self.line, "has no residues", "Remove the record.")
        sequence = b"".join(self._sequence)
        if self._rules.replacements:
            sequence = sequence.translate(self._rules.replacements)
        name, description = split_header(self._header.decode(errors="replace"))
        return FastaRecord(name, description, sequence.decode("ascii").upper())

    def _bad_symbol(self, line: int, symbol: str) -> BadRecord:
        reason = f"has the symbol {symbol!r}, which is none of the residues {self._rules.symbols}"
        return self._bad(line, reason, _remedy(symbol, self._rules.unknown))

    def _bad(self, line: int, reason: str, remedy: str) -> BadRecord:
        name, _ = split_header(self._header[:200].decode(errors="replace"))
        self._is_bad, self._header, self._sequence = True, b"", []
        return BadRecord(line, name, reason, remedy)


def _remedy(symbol: str, unknown: str | None) -> str:
    if symbol == "*":
        return "A stop is only allowed at the end of a sequence: cut the sequence there."
    if symbol == ">":
        return "Remove it, or begin a line before it if it begins a header."
    if symbol == "\ufeff":
        return "Remove it: a byte order mark is only allowed at the beginning of a file."
    if symbol in string.ascii_letters and unknown is not None:
        return (
            f"Replace it, or read it as {unknown} with --on_error=replace (on_error='replace' in "
            "Python)."
        )
    others = [name for name, alphabet in ALPHABETS.items() if symbol in alphabet.letters]
    if others:
        gaps = any(symbol in ALPHABETS[name].gaps for name in others)
        return (
            f"Remove {'the gaps of the alignment first' if gaps else 'it'}, or train a model whose "
            f"alphabet has it: {' or '.join(others)} (make_protein_domain.alphabet)."
        )
    return "Remove it, and check that the file is FASTA of the model's alphabet."


def _nul(path: Path, line: int) -> FastaError:
    return FastaError(
        f"{path}, line {line}: has a NUL byte: the file is binary, damaged, or "
        "UTF-16 without a byte order mark. Save it as plain text, UTF-8, or fetch it again."
    )


def _no_fasta(path: Path, line: int, part: bytes) -> FastaError:
    guess = name_format(part)
    text = part.lstrip()
    line += part.count(b"\n", 0, len(part) - len(text))
    shown = text[:200].decode(errors="replace").splitlines()[0].strip()[:40]
    return FastaError(
        f"{path}, line {line}: expected a header that begins with '>', but got {shown!r}. {guess}"
    )
