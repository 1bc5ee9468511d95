"""Reading and writing FASTA files of proteins."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fast_attention.protein_lm.data.alphabet import FASTA_SYMBOLS, Alphabet
from fast_attention.protein_lm.data.alphabets import PROTEIN
from fast_attention.protein_lm.data.fasta_parser import (
    BadRecord,
    FastaRecord,
    RecordRules,
    scan_fasta,
    split_header,
)
from fast_attention.protein_lm.files.output_files import open_output
from fast_attention.protein_lm.files.text_source import FastaError


def read_fasta(
    path: str | os.PathLike[str],
    *,
    alphabet: Alphabet = PROTEIN,
    on_error: str = "raise",
) -> Iterator[FastaRecord]:
    """Reads proteins one by one; the file is opened at the first of them.

    `read_proteins` does the same with several files and folders, and can leave records out.

    Plain and gzip-compressed files (of one or several members) are told apart by their content.
    Any line ends, a byte order mark, blank lines and blanks inside sequences are accepted, and
    lower case is raised to upper case. A ``*`` that ends a sequence is a translated stop codon
    and is dropped.

    Args:
      path: the file.
      alphabet: its `Alphabet.symbols` may occur.
      on_error: what to do at a letter outside ``alphabet``: ``"raise"``, or ``"replace"`` it by
        that of the unknown residue. Other symbols outside ``alphabet`` (gaps, digits, inner stops)
        always raise.

    Yields:
      The records, in the order of the file.

    Raises:
      FastaError: if the file is missing, a folder, empty, cut off, or no FASTA file, if a record
        has no residues, or at a symbol that is no residue.
    """
    check_options(alphabet, on_error, ("raise", "replace"))
    return _read(Path(path), alphabet, on_error == "replace")


def _read(path: Path, alphabet: Alphabet, replace: bool) -> Iterator[FastaRecord]:
    for _, record in scan_fasta(path, RecordRules(alphabet, replace=replace)):
        if isinstance(record, BadRecord):
            raise record_error(path, record)
        yield record


def record_error(path: Path, record: BadRecord) -> FastaError:
    """The error that tells of a record that cannot be read."""
    return FastaError(
        f"{path}, line {record.line}: record {record.id!r} {record.reason}. {record.remedy}"
    )


def check_options(alphabet: Alphabet, on_error: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError if ``on_error`` is none of the choices, or not possible."""
    if on_error not in choices:
        raise ValueError(
            f"on_error must be {' or '.join(map(repr, choices))}, but got {on_error!r}."
        )
    if on_error == "replace" and alphabet.unknown is None:
        raise ValueError(
            "on_error='replace' needs a letter for the unknown residue (Alphabet.unknown), but the "
            f"alphabet has only {alphabet.symbols}."
        )


def write_fasta(
    path: str | os.PathLike[str], records: Iterable[FastaRecord], width: int = 80
) -> None:
    """Writes proteins so that ``read_fasta`` gives the same records back.

    It is compressed when the name ends in ``.gz``, and opened by `output_files.open_output`.

    Args:
      path: the file.
      records: the proteins.
      width: residues a line.

    Raises:
      ValueError: at a record that could not be read back (a blank in the id, a line end in the
        description, an empty sequence or one with a symbol outside `FASTA_SYMBOLS`), or if
        ``width`` is not positive; nothing is written then.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, but got {width}.")
    path = Path(path)
    with open_output(path) as raw:
        # Without a name and a time stamp, equal records give equal bytes.
        stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        with io.TextIOWrapper(stream, encoding="utf-8", newline="\n") as text:
            for record in records:
                _check_writable(record)
                text.write(f">{record.id} {record.description}".rstrip() + "\n")
                for start in range(0, len(record.sequence), width):
                    text.write(record.sequence[start : start + width] + "\n")


def _check_writable(record: FastaRecord) -> None:
    header = f"{record.id} {record.description}"
    if split_header(header) != record[:2] or len(header.splitlines()) > 1:
        raise ValueError(
            "A record needs an id without blanks and a description of one line without blanks "
            f"around it, but got {record.id!r} and {record.description!r}."
        )
    try:
        header.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The header of record {record.id!r} is no text: {error}.") from None
    letters = record.sequence
    if not letters or not set(letters) <= set(FASTA_SYMBOLS):
        raise ValueError(
            f"The sequence of record {record.id!r} must be one or more of the symbols "
            f"{FASTA_SYMBOLS}, but got {letters[:60]!r}."
        )
