"""Reading and writing FASTA files of proteins, and folders of them."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fast_attention.protein_lm.data.alphabet import FASTA_SYMBOLS, Alphabet
from fast_attention.protein_lm.data.alphabets import PROTEIN
from fast_attention.protein_lm.data.fasta_parser import (
    MAX_RESIDUES,
    BadRecord,
    FastaRecord,
    RecordRules,
    scan_fasta,
    split_header,
)
from fast_attention.protein_lm.data.skipped_records import SkippedRecord, SkippedRecords
from fast_attention.protein_lm.data.table_rows import is_table, scan_table
from fast_attention.protein_lm.files.output_files import open_output
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.machine_failures import machine_failure

FastaPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

STDIN = Path("/dev/stdin")
"""Standard input, for which ``-`` stands."""

EXTENSIONS = (".fasta", ".fa", ".faa", ".fas", ".pep")
"""What makes a file of a folder a FASTA file, in lower or upper case, with or without ``.gz``."""


def read_fasta(
    path: str | os.PathLike[str],
    *,
    alphabet: Alphabet = PROTEIN,
    on_error: str = "raise",
) -> Iterator[FastaRecord]:
    """Reads proteins one by one; the file is opened at the first of them.

    `read_proteins` does the same with several files and folders, and can leave records out.

    Plain and gzip-compressed files (of one or several members) are recognised by their content.
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
    rules = RecordRules(alphabet, replace=on_error == "replace")
    return _read([Path(path)], rules, None, unique_ids=False)


def fasta_paths(paths: FastaPaths) -> list[Path]:
    """The files that are meant: folders are replaced by the FASTA files in them.

    Those are the files with one of `EXTENSIONS` or one of these and ``.gz``, in the order of their
    names. Folders inside a folder and hidden files are not looked at. A file that is named
    itself may have any name.

    Args:
      paths: one file or folder, or several; the text ``-`` is standard input.

    Raises:
      FastaError: if a folder has no FASTA file.
      ValueError: if there is no path, or standard input is named twice.
    """
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    # As text alone: Path("-") is also what becomes of "./-", a file.
    listed = [STDIN if path == "-" else path for path in listed]
    if listed.count(STDIN) > 1:
        raise ValueError("- means standard input, which can be read only once: give it once.")
    if not listed:
        raise ValueError("Expected at least one FASTA file, but got an empty list.")
    return [file for path in listed for file in _files(Path(path))]


def _files(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
        found = sorted(
            entry
            for entry in path.iterdir()
            if entry.name.lower().removesuffix(".gz").endswith(EXTENSIONS)
            and not entry.name.startswith(".")
            and not entry.is_dir()
        )
    except (OSError, ValueError) as error:
        remedy = machine_failure(error) or "check the path"
        raise FastaError(f"{path}: cannot be read ({error}): {remedy}.") from error
    if not found:
        raise FastaError(
            f"{path}: the folder has no FASTA files, by their names: {', '.join(EXTENSIONS)}, or "
            "these and .gz. Subfolders are ignored: give the files themselves."
        )
    return found


def read_proteins(
    paths: FastaPaths,
    *,
    alphabet: Alphabet = PROTEIN,
    marks: str = "",
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
    unique_ids: bool = False,
    max_residues: int = MAX_RESIDUES,
    too_long: str | None = None,
) -> Iterator[FastaRecord]:
    """Reads proteins one by one from one or several files.

    See `read_fasta` for what a FASTA file may be. A file whose name ends in ``.csv`` or ``.tsv``
    (or these and ``.gz``) is a table, see `table_rows`.

    What is wrong with a record can be skipped. What is wrong with a file (missing, empty, cut off,
    no FASTA file, NUL bytes) always raises, since the number of lost records is unknown.

    Args:
      paths: one file or folder, or several, see `fasta_paths`.
      alphabet: its `Alphabet.symbols` may occur.
      marks: other symbols that may occur.
      on_error: what to do with a record that cannot be read: ``"raise"``; ``"skip"``, which
        leaves it out and adds it to ``skipped``; or ``"replace"``, which takes letters
        outside ``alphabet`` for the unknown residue, and raises at anything else.
      skipped: collects what ``on_error="skip"`` leaves out, which needs it.
      unique_ids: whether a second record of the same id, in any of the files, or one without an id
        is an error, too. By default both are kept. Costs about 150 bytes of memory per record.
      max_residues: the most residues of a record, and what bounds the memory.
      too_long: what an error about a longer record recommends; None takes a general
        remedy.

    Returns:
      The records, in the order of the files.

    Raises:
      FastaError: at what cannot be read, or if all records were left out.
      ValueError: at an unknown ``on_error``, or if there is no path.
    """
    check_options(alphabet, on_error, ("raise", "skip", "replace"))
    if on_error != "skip":
        skipped = None
    elif skipped is None:
        raise ValueError(
            "on_error='skip' needs skipped=SkippedRecords(), to report skipped records."
        )
    rules = RecordRules(
        alphabet,
        marks=marks,
        replace=on_error == "replace",
        max_residues=max_residues,
        too_long=too_long,
    )
    return _read(fasta_paths(paths), rules, skipped, unique_ids)


def _read(
    files: list[Path],
    rules: RecordRules,
    skipped: SkippedRecords | None,
    unique_ids: bool,
) -> Iterator[FastaRecord]:
    kept, left_out = 0, None
    # Hashes of ids, and one number for file and line: half of what ids and tuples would take.
    places: dict[int, int] = {}
    for index, path in enumerate(files):
        scan = scan_table if is_table(path) else scan_fasta
        for line, record in scan(path, rules):
            if unique_ids and isinstance(record, FastaRecord):
                place = line * len(files) + index
                first = places.setdefault(hash(record.id), place)
                if not record.id or first != place:
                    first_line, first_index = divmod(first, len(files))
                    record = _not_unique(record.id, line, files[first_index], first_line)
            if skipped is not None:
                skipped.total += 1
            if isinstance(record, FastaRecord):
                kept += 1
                yield record
                continue
            if skipped is None:
                raise record_error(path, record)
            left_out = left_out or record_error(path, record)
            skipped.add(SkippedRecord(str(path), record.line, record.id, record.reason))
    if not kept and skipped is not None:
        raise FastaError(
            f"All records ({skipped.count:,}) were skipped, so there is nothing to do. The first: "
            f"{left_out}"
        )


def _not_unique(name: str, line: int, first_path: Path, first_line: int) -> BadRecord:
    if not name:
        return BadRecord(line, name, "has no id", "Write one after the '>'.")
    reason = f"has the id of the record at {first_path}, line {first_line}"
    return BadRecord(line, name, reason, "Give each record its own id, or remove one.")


def record_error(path: Path, record: BadRecord) -> FastaError:
    """The error about a record that cannot be read."""
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
            "--on_error=replace (on_error='replace' in Python) needs a letter for the unknown "
            f"residue (Alphabet.unknown), but the alphabet has only {alphabet.symbols}."
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
        raise ValueError(f"The header of record {record.id!r} is not text: {error}.") from None
    letters = record.sequence
    if not letters or not set(letters) <= set(FASTA_SYMBOLS):
        raise ValueError(
            f"The sequence of record {record.id!r} must be one or more of the symbols "
            f"{FASTA_SYMBOLS}, but got {letters[:60]!r}."
        )
