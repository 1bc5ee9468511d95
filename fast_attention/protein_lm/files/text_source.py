"""The text of a file, whatever it is compressed or encoded with, in pieces of bounded size."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from fast_attention.protein_lm.machine_failures import machine_failure

PIECE_BYTES = 1 << 18
"""Bytes read at a time: a file that unpacks to more than the memory is still read in this much."""

_GZIP_MAGIC = b"\x1f\x8b"
# The mark of UTF-32 begins with that of UTF-16: it must be tried first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class FastaError(ValueError):
    """A FASTA file cannot be read; the message names the file, the line and the remedy."""


def read_pieces(path: Path) -> Iterator[bytes]:
    r"""Yields the text of a file as UTF-8 whose lines end in ``\n``, cut anywhere.

    Plain and gzip-compressed files (of one or several members) are recognized by their content,
    never by their name. UTF-16 and UTF-32 are understood where a byte order mark announces them;
    anything else is passed on as it is. Nothing is sought, so that pipes can be read, too.

    Args:
      path: The file.

    Raises:
      FastaError: If the file is missing, a folder, not readable, or cut off.
    """
    try:
        with _open(path) as raw:
            if raw.peek(2)[:2] == _GZIP_MAGIC:
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield from _normalised(cast(BinaryIO, unpacked), path)
            else:
                yield from _normalised(raw, path)
    except FileNotFoundError:
        if str(path) == "-":
            raise FastaError(
                "- means standard input, which this option does not read: give a file."
            ) from None
        raise FastaError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise FastaError(f"{path}: is a folder. Give a file in it instead.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FastaError(
            f"{path}: the compressed data is cut off or damaged ({error}). Fetch the file again."
        ) from error
    except OSError as error:
        remedy = machine_failure(error) or "check the file"
        raise FastaError(
            f"{path}: cannot be read ({error.strerror or error}): {remedy}."
        ) from error


def _open(path: Path) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except ValueError as error:
        raise FastaError(f"{str(path)!r}: is not a valid file name ({error}).") from error


def _normalised(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    after_return = False
    for piece in _decoded(stream, path):
        if after_return:
            piece = piece.removeprefix(b"\n")
        after_return = piece.endswith(b"\r")
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield piece


def _decoded(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    piece = stream.read(PIECE_BYTES)
    mark = next((mark for mark in _MARKS if piece.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    # What is no UTF-8 passes: a strange byte in a header must not stop the reading.
    decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
    text = piece[len(mark) :]
    try:
        while piece:
            yield decoder.decode(text).encode() if decoder else text
            text = piece = stream.read(PIECE_BYTES)
        if decoder:
            decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise FastaError(
            f"{path}: begins as {encoding.upper()}, but is damaged ({error}). Save it as plain "
            "text, UTF-8."
        ) from error
