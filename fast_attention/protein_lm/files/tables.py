"""Tables, one row per protein, written as they come: text or Parquet, by the file's extension.

Text is UTF-8. The first line names the columns, a tab (``.tsv``) or a comma (``.csv``) separates
cells and a line feed ends rows. A cell that holds the separator, a quotation mark or a line end is
quoted as in RFC 4180: between quotation marks, with those inside it doubled. Numbers have the
fewest digits that read back as the same number; ``nan`` stands for a missing one. Characters that
UTF-8 cannot encode (surrogates) are written with a backslash. Python, pandas and R read it with

  csv.DictReader(open(path, newline="", encoding="utf-8"), delimiter="<tab>")
  pandas.read_csv(path, sep="<tab>", dtype={"id": str}, keep_default_na=False,
                  na_values={"perplexity": ["nan"]})
  read.delim(path, colClasses=c(id="character"), na.strings=character(), check.names=FALSE)

Where the type of ``id`` is not given, the last two take ``007`` for a number and ``NA`` for none.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from fast_attention.protein_lm.files.output_files import open_output
from fast_attention.protein_lm.files.output_targets import is_special

EXTENSIONS = (".tsv", ".csv", ".tsv.gz", ".csv.gz", ".parquet")
"""What the name of a table may end in, in lower case."""

ROW_GROUP = 16384
"""Rows of a Parquet file that are written together."""

_TERMINATOR = "\r\n"

Write = Callable[[Sequence[Any]], None]


def find_extension(path: str | os.PathLike[str], extensions: Sequence[str]) -> str:
    """Returns the extension that says in which format an output is written.

    Args:
      path: The file. A device, a pipe or standard output whose name says nothing is written in the
        first format.
      extensions: Those that are possible, in lower case.

    Raises:
      ValueError: If a plain file has none of the extensions.
    """
    name = Path(path).name.lower()
    found = [extension for extension in extensions if name.endswith(extension)]
    if found:
        return found[0]
    if not is_special(path):
        raise ValueError(
            f"{path}: the extension of the output selects the format, and must be one of "
            f"{', '.join(extensions)}"
        )
    return extensions[0]


@contextlib.contextmanager
def open_table(path: str | os.PathLike[str], columns: Mapping[str, type]) -> Iterator[Write]:
    """Gives a function that writes one row.

    Args:
      path: The file, with one of `EXTENSIONS`, see `output_files.open_output`. The names of the
        columns are written with the first row, or at the end of a table without rows: what is
        written directly is empty where the first row fails.
      columns: Type (str, int or float) of each column, by its name.

    Raises:
      ValueError: At another extension.
      OutputError: If the file cannot be written.
    """
    extension = find_extension(path, EXTENSIONS)
    parquet = extension == ".parquet"
    with open_output(path, seekable=parquet) as file:
        if parquet:
            with _parquet(file, columns) as write:
                yield write
        else:
            with _text(file, columns, extension) as write:
                yield write


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes whole columns of equal length, see `open_table`."""
    types = {name: _type(values) for name, values in columns.items()}
    with open_table(path, types) as write:
        for row in zip(*columns.values(), strict=True):
            write(row)


def _type(values: Sequence[Any]) -> type:
    if len(values) and isinstance(values[0], (int, np.integer)):
        return int
    return float if len(values) and isinstance(values[0], (float, np.floating)) else str


@contextlib.contextmanager
def _text(raw: BinaryIO, columns: Mapping[str, type], extension: str) -> Iterator[Write]:
    with contextlib.ExitStack() as stack:
        stream: Any = raw
        if extension.endswith(".gz"):
            # Without a name and a time stamp, equal rows give equal bytes.
            stream = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        text = stack.enter_context(
            io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="")
        )
        writer = csv.writer(
            _LineFeeds(text),
            delimiter="\t" if extension.startswith(".tsv") else ",",
            lineterminator=_TERMINATOR,
        )
        rows = 0

        def write(row: Sequence[Any]) -> None:
            nonlocal rows
            if not rows:
                writer.writerow(columns)
            rows += 1
            writer.writerow(map(_cell, row))

        yield write
        if not rows:
            writer.writerow(columns)


class _LineFeeds:
    """Ends lines in line feeds.

    Up to Python 3.12, the csv module quotes a line end only if it is part of the terminator.
    """

    def __init__(self, text: TextIO):
        self._text = text

    def write(self, line: str) -> None:
        self._text.write(f"{line.removesuffix(_TERMINATOR)}\n")


def _cell(value: Any) -> Any:
    if isinstance(value, np.floating) and not isinstance(value, float):
        return str(value)  # The fewest digits of its own precision.
    return repr(float(value)) if isinstance(value, float) else value


@contextlib.contextmanager
def _parquet(file: BinaryIO, columns: Mapping[str, type]) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    rows: list[Sequence[Any]] = []
    with pq.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            arrays = [
                pa.array(column, field.type)
                for column, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            rows.clear()

        def write(row: Sequence[Any]) -> None:
            rows.append([_storable(value) for value in row])
            if len(rows) == ROW_GROUP:
                flush()

        yield write
        if rows:
            flush()


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value
