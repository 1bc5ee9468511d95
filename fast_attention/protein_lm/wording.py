"""Numbers, durations and places in the sentences of messages."""

from __future__ import annotations

import os


def counted(number: int, noun: str) -> str:
    """A number and what is counted: ``1 protein``, ``1,200 proteins``."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def duration(seconds: float) -> str:
    """A time in the unit that shows it, such as ``0.4 seconds`` or ``3.5 minutes``."""
    if seconds < 9.95:
        return f"{max(seconds, 0.1):.1f} seconds"
    if seconds < 99.5:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5970 else f"{seconds / 3600:.1f} hours"


def place(path: str | os.PathLike[str]) -> str:
    """An output as a message names it, in one line."""
    name = os.fspath(path)
    return "standard output" if name == "-" else name.replace("\n", "\\n")


def source(path: str) -> str:
    """A file to read as a message names it."""
    return "standard input" if path == "-" else path
