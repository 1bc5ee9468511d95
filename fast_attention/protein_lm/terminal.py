"""Standard streams: those that are closed, and control characters in what is printed.

A terminal obeys control characters: they move the cursor, hide text, set the title or answer as if
a person had typed. Names of files, headers and JSON may hold any, and each message may quote them.
"""

from __future__ import annotations

import io
import os
import re
import sys

_CONTROL = re.compile(
    # C0 without tab and line feed, C1, and marks that reorder or separate lines.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def escape_controls(text: str) -> str:
    r"""Writes control characters as ``\x1b``, ``\u202e`` and so on; tabs and line ends stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class TerminalText(io.TextIOWrapper):
    """A text stream whose control characters are escaped.

    A carriage return at the beginning or the end of what is written at once stays: it is that of a
    progress bar.
    """

    def write(self, text: str) -> int:
        """Writes text, see `escape_controls`; returns its length."""
        inner = text.strip("\r")
        begin, _, end = text.partition(inner) if inner else (text, "", "")
        super().write(begin + escape_controls(inner) + end)
        return len(text)


def for_terminal(stream: io.TextIOWrapper) -> TerminalText:
    """A stream to the same file as another one, which it replaces.

    Letters that the encoding lacks are written as escapes, too. The other stream, which closes the
    file when it is deleted, must be kept, as Python does with the standard ones.
    """
    stream.flush()
    return TerminalText(
        stream.buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def fill_closed_streams() -> None:
    """Puts an empty device in place of each standard stream that is closed.

    Otherwise the next file that is opened has its number: libraries would print into an output, and
    ``-`` would be some other file. Reading standard input then finds nothing, writing a result to
    standard output is an error, and messages are lost.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, mode), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)  # As Python keeps it, see `for_terminal`.
