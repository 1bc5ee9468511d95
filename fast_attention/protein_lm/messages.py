"""Messages of a command on stderr: notes and progress, which ``--quiet`` leaves out.

On a terminal, progress is a bar. Elsewhere (a file, a pipe, a batch system) it is a line a minute.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TextIO, TypeVar

from fast_attention.protein_lm.wording import duration

INTERVAL = 60.0
"""Seconds between two lines of progress, where no terminal shows a bar."""

_QUIET = contextvars.ContextVar("quiet", default=False)

Item = TypeVar("Item")


class Progress(Protocol):
    """How far something is."""

    def update(self, n: int = 1) -> Any:
        """So many more units are done."""

    def unpause(self) -> None:
        """The time until now does not count."""

    def set_postfix(self, ordered_dict: Mapping[str, Any]) -> None:
        """Figures to show beside."""


@contextlib.contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Leaves out notes and progress in the block, if `quiet` is true."""
    token = _QUIET.set(quiet)
    try:
        yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Whether notes and progress are left out."""
    return _QUIET.get()


def note(text: str, file: TextIO | None = None) -> None:
    """Prints what is worth knowing but no result, to stderr by default."""
    if not is_quiet():
        print(text, file=file or sys.stderr)


@contextlib.contextmanager
def progress(
    title: str, unit: str, total: int | None = None, initial: int = 0, *, show: bool = True
) -> Iterator[Progress]:
    """Shows on stderr how far something is.

    Args:
      title: What is being done.
      unit: Of what is counted, in the plural.
      total: How many there are, if that is known.
      initial: How many were done before.
      show: Whether to show anything.

    Yields:
      What to print for each finished unit.
    """
    show = show and not is_quiet()
    if not (show and sys.stderr.isatty()):
        yield _Lines(title, unit, total, initial, show)
        return
    from tqdm import tqdm

    with tqdm(
        desc=title,
        unit=f" {unit}",
        unit_scale=total is None,
        total=total,
        initial=initial,
        dynamic_ncols=True,
        smoothing=0,
        mininterval=0.5,
    ) as bar:
        yield bar


def counting(items: Iterable[Item], title: str, unit: str, total: int) -> Iterator[Item]:
    """Passes items on, and shows how many have been."""
    with progress(title, unit, total) as bar:
        for item in items:
            yield item
            bar.update(1)


class _Lines:
    """A line every `INTERVAL` seconds."""

    def __init__(self, title: str, unit: str, total: int | None, initial: int, show: bool):
        self._title, self._unit, self._total, self._show = title, unit, total, show
        self._initial = self._done = initial
        self._began = self._told = time.monotonic()
        self._figures = ""

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if self._show and now - self._told >= INTERVAL:
            self._told = now
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def unpause(self) -> None:
        self._began, self._initial = time.monotonic(), self._done

    def set_postfix(self, ordered_dict: Mapping[str, Any]) -> None:
        self._figures = "".join(f", {name} {value}" for name, value in ordered_dict.items())

    def _line(self, seconds: float) -> str:
        """Such as ``training: 40 of 400 steps, 3.1 minutes left, loss 2.9``."""
        if self._total is None:
            return f"{self._title}: {self._done:,} {self._unit}{self._figures}"
        each = seconds / max(self._done - self._initial, 1)
        left = duration((self._total - self._done) * each)
        return (
            f"{self._title}: {self._done:,} of {self._total:,} {self._unit}, {left} left"
            f"{self._figures}"
        )
