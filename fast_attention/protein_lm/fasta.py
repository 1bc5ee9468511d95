"""Reading and writing FASTA files of proteins."""

from __future__ import annotations

import gzip
import io
import os
import string
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fast_attention.protein_lm.vocabulary import ANOMALOUS_RESIDUES, STANDARD_RESIDUES

PROTEIN_LETTERS = STANDARD_RESIDUES + ANOMALOUS_RESIDUES
_GZIP_MAGIC = b"\x1f\x8b"


class FastaError(ValueError):
    """A FASTA file cannot be read; the message names the file, the line and the remedy."""


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


def read_fasta(
    path: str | os.PathLike[str],
    *,
    alphabet: str = PROTEIN_LETTERS,
    on_error: str = "raise",
    drop_stop: bool = True,
) -> Iterator[FastaRecord]:
    """Reads proteins one by one; the file is opened at the first of them.

    Plain and gzip-compressed files (of one or several members) are told apart by their content.
    Any line ends, a byte order mark, blank lines and blanks inside sequences are accepted, and
    lower case is raised to upper case. A ``*`` that ends a sequence is a translated stop codon
    and is dropped.

    Args:
      path: the file.
      alphabet: the residues that may occur, in upper case.
      on_error: what to do at a letter outside ``alphabet``: ``"raise"``, or ``"replace"`` it by
        ``X``, the unknown residue. Other symbols (gaps, digits, inner stops) always raise.
      drop_stop: False takes a ``*`` at the end for what the alphabet says.

    Yields:
      The records, in the order of the file.

    Raises:
      FastaError: if the file is missing, a folder, empty, cut off, or no FASTA file, if a record
        has no residues, or at a symbol that is no residue.
    """
    if on_error not in ("raise", "replace"):
        raise ValueError(f"on_error must be 'raise' or 'replace', but got {on_error!r}.")
    if on_error == "replace" and "X" not in alphabet:
        raise ValueError(f"on_error='replace' needs X in the alphabet, but got {alphabet!r}.")
    return _read_records(Path(path), alphabet, on_error == "replace", "*" if drop_stop else "")


def _read_records(path: Path, alphabet: str, replace: bool, stop: str) -> Iterator[FastaRecord]:
    allowed = frozenset(alphabet + alphabet.lower())
    header, start, lines = None, 0, []
    for number, line in enumerate(_read_lines(path), 1):
        if line.startswith(">"):
            if header is not None:
                yield _make_record(path, start, header, lines, allowed, replace, stop)
            header, start, lines = line[1:], number, []
        elif header is not None:
            lines.append(line)
        elif line.strip():
            raise FastaError(
                f"{path}, line {number}: expected a header that begins with '>', but got "
                f"{line.strip()[:40]!r}. Give a FASTA file, plain or compressed with gzip."
            )
    if header is None:
        raise FastaError(f"{path}: the file is empty. Give a FASTA file with at least one protein.")
    yield _make_record(path, start, header, lines, allowed, replace, stop)


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if compressed else raw
            # Headers are free text of any age; a strange byte in one must not stop the reading.
            with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace") as text:
                yield from text
    except FileNotFoundError:
        raise FastaError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise FastaError(f"{path}: is a folder. Give the FASTA files in it instead.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FastaError(
            f"{path}: the compressed data is cut off or damaged ({error}). Fetch the file again."
        ) from error
    except OSError as error:
        raise FastaError(f"{path}: cannot be read ({error.strerror}).") from error


def _make_record(
    path: Path,
    start: int,
    header: str,
    lines: list[str],
    allowed: frozenset[str],
    replace: bool,
    stop: str,
) -> FastaRecord:
    name, description = _split_header(header)
    sequence = "".join("".join(lines).split()).removesuffix(stop)
    if not sequence:
        raise FastaError(
            f"{path}, line {start}: record {name!r} has no residues. Remove the record."
        )
    unknown = set(sequence) - allowed
    if unknown and replace:
        letters = unknown.intersection(string.ascii_letters)
        sequence = sequence.translate({ord(letter): "X" for letter in letters})
        unknown -= letters
    if unknown:
        line, symbol = next(
            (number, symbol)
            for number, line in enumerate(lines, start + 1)
            for symbol in line
            if symbol in unknown
        )
        raise FastaError(
            f"{path}, line {line}: record {name!r} has the symbol {symbol!r}, which is none of the "
            f"residues {''.join(sorted(filter(str.isupper, allowed)))}. {_remedy(symbol)}"
        )
    return FastaRecord(name, description, sequence.upper())


def _split_header(header: str) -> tuple[str, str]:
    name, _, description = " ".join(header.split(None, 1)).rstrip().partition(" ")
    return name, description


def _remedy(symbol: str) -> str:
    if symbol in "-.":
        return "Remove the gaps of the alignment first."
    if symbol == "*":
        return "A stop may only end a sequence: cut the sequence there."
    if symbol in string.ascii_letters:
        return "Replace it, or read the file with on_error='replace', which takes it for X."
    return "Remove it, and check that this is a FASTA file of proteins."


def write_fasta(
    path: str | os.PathLike[str], records: Iterable[FastaRecord], width: int = 80
) -> None:
    """Writes proteins so that ``read_fasta`` gives the same records back.

    The file appears under its name only when it is complete; an old one is replaced then. It is
    compressed when the name ends in ``.gz``.

    Args:
      path: the file.
      records: the proteins.
      width: residues a line.

    Raises:
      ValueError: at a record that could not be read back (a blank in the id, a line end in the
        description, an empty sequence or one with other symbols than upper-case letters), or if
        ``width`` is not positive; nothing is written then.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, but got {width}.")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as raw:
            # Without a name and a time stamp, equal records give equal bytes.
            stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            with io.TextIOWrapper(stream, encoding="utf-8", newline="\n") as text:
                for record in records:
                    _check_writable(record)
                    text.write(f">{record.id} {record.description}".rstrip() + "\n")
                    for start in range(0, len(record.sequence), width):
                        text.write(record.sequence[start : start + width] + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_writable(record: FastaRecord) -> None:
    header = f"{record.id} {record.description}"
    if _split_header(header) != record[:2] or len(header.splitlines()) > 1:
        raise ValueError(
            "A record needs an id without blanks and a description of one line without blanks "
            f"around it, but got {record.id!r} and {record.description!r}."
        )
    letters = record.sequence
    if not (letters.isascii() and letters.isalpha() and letters.isupper()):
        raise ValueError(
            f"The sequence of record {record.id!r} must be one or more upper-case letters, but "
            f"got {letters[:60]!r}."
        )
