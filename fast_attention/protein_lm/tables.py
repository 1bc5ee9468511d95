"""Tables, one row per protein, written as they come: text or Parquet, by the file's extension."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_attention.protein_lm.output_files import replacing

EXTENSIONS = (".tsv", ".csv", ".tsv.gz", ".csv.gz", ".parquet")
"""What the name of a table may end in, in lower case."""

ROW_GROUP = 16384
"""Rows of a Parquet file that are written together."""

Write = Callable[[Sequence[Any]], None]


def find_extension(path: str | os.PathLike[str], extensions: Sequence[str]) -> str:
    """Returns the extension that a file's name has.

    Args:
      path: The file.
      extensions: Those that are possible, in lower case.

    Raises:
      ValueError: If it has none of them.
    """
    name = Path(path).name.lower()
    found = [extension for extension in extensions if name.endswith(extension)]
    if not found:
        raise ValueError(
            f"{path}: the name of the output says what is written, and must end in one of "
            f"{', '.join(extensions)}"
        )
    return found[0]


@contextlib.contextmanager
def open_table(path: str | os.PathLike[str], columns: Mapping[str, type]) -> Iterator[Write]:
    """Gives a function that writes one row.

    The file appears under its name when the ``with`` block ends without an error; an old one is
    replaced then.

    Args:
      path: The file, with one of `EXTENSIONS`.
      columns: Type (str, int or float) of each column, by its name. Text holds as many digits of
        a number as it takes to read the same number back, and ``nan`` for none.

    Raises:
      ValueError: At another extension.
      OutputError: If the file cannot be written.
    """
    extension = find_extension(path, EXTENSIONS)
    with replacing(path) as temporary:
        if extension == ".parquet":
            with _parquet(temporary, columns) as write:
                yield write
        else:
            with _text(temporary, columns, extension) as write:
                yield write


@contextlib.contextmanager
def _text(path: Path, columns: Mapping[str, type], extension: str) -> Iterator[Write]:
    with open(path, "wb") as raw, contextlib.ExitStack() as stack:
        stream: Any = raw
        if extension.endswith(".gz"):
            # Without a name and a time stamp, equal rows give equal bytes.
            stream = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        text = stack.enter_context(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        delimiter = "\t" if extension.startswith(".tsv") else ","
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        yield writer.writerow


@contextlib.contextmanager
def _parquet(path: Path, columns: Mapping[str, type]) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    rows: list[Sequence[Any]] = []
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            arrays = [
                pa.array(column, field.type)
                for column, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            rows.clear()

        def write(row: Sequence[Any]) -> None:
            rows.append(row)
            if len(rows) == ROW_GROUP:
                flush()

        yield write
        if rows:
            flush()
