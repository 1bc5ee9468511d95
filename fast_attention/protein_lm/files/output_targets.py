"""Where an output goes, and why it cannot be written: plain files, devices, pipes and ``-``."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path
from typing import NamedTuple, TextIO

AnyPath = str | os.PathLike[str]

STDOUT = "-"
"""The name of standard output."""

_REMEDIES = {
    errno.ENOENT: "its folder does not exist: create it first",
    errno.ENOTDIR: "its folder is a file: choose another name",
    errno.EISDIR: "it is a folder: choose another name",
    errno.ENOSPC: "the disk is full: make room, or write elsewhere",
    errno.EDQUOT: "your disk quota is used up: make room, or write elsewhere",
    errno.EFBIG: "the file exceeds the size limit: write elsewhere",
    errno.EACCES: "permission denied: write elsewhere",
    errno.EBADF: "it is closed, or open for reading: give a file",
    errno.EPERM: "permission denied: write elsewhere",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.ENAMETOOLONG: "the name is too long: choose another",
    errno.ELOOP: "its symbolic links form a loop: choose another name",
}


class OutputError(OSError):
    """A file cannot be written; the message names it, says why and what to do."""


class Target(NamedTuple):
    """Where an output goes: its path without links, and what is there now."""

    path: Path
    descriptor: int | None
    stat: os.stat_result | None

    @property
    def special(self) -> bool:
        """Whether it is written in place: a device, a pipe or an open descriptor."""
        if self.descriptor is not None:
            return True
        return self.stat is not None and not (
            stat.S_ISREG(self.stat.st_mode) or stat.S_ISDIR(self.stat.st_mode)
        )


def resolve(path: AnyPath) -> Target:
    """Follows links and finds what is there.

    Raises:
      OSError: If a folder above it cannot be searched, or links form a loop.
      ValueError: If the path has a NUL byte.
    """
    text = os.fspath(path)
    descriptor = 1 if text == STDOUT else _descriptor(text)
    if descriptor is not None:
        try:
            return Target(Path(text), descriptor, os.fstat(descriptor))
        except OSError:
            return Target(Path(text), descriptor, None)
    try:
        real = Path(os.path.realpath(text))
        return Target(real, None, os.stat(real))
    except FileNotFoundError:
        return Target(real, None, None)
    except NotADirectoryError:
        return Target(real, None, None)


def status_stream(*outputs: AnyPath | None) -> TextIO:
    """Where a command prints what it did: stderr where one of its outputs is standard output."""
    try:
        standard = os.fstat(1)
    except OSError:
        return sys.stdout
    for path in outputs:
        if path is None:
            continue
        target = resolve(path)
        if target.descriptor == 1 or (has(target, standard) and not is_null(target)):
            return sys.stderr
    return sys.stdout


def is_special(path: AnyPath) -> bool:
    """Whether an output is a device, a named pipe or standard output rather than a plain file."""
    return resolve(path).special


def explain(error: OSError | ValueError) -> str:
    """Why something cannot be written, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    return _REMEDIES.get(number or 0) or getattr(error, "strerror", None) or str(error)


def _descriptor(text: str) -> int | None:
    """The number of an open descriptor that a path such as ``/dev/stdout`` means, if any."""
    for _ in range(40):
        folder, name = os.path.split(os.path.abspath(text))
        folder = os.path.realpath(folder)
        if name.isdigit() and folder in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
            return int(name)
        try:
            text = os.path.join(folder, os.readlink(os.path.join(folder, name)))
        except (OSError, ValueError):
            return None
    return None


def check_descriptor(descriptor: int) -> None:
    """Raises OSError if an open descriptor cannot be written to."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def same(one: Target, other: Target) -> bool:
    """Whether two outputs are one file, whatever they are called."""
    if one.stat is None or other.stat is None:
        return one.stat is other.stat and one.path == other.path
    return os.path.samestat(one.stat, other.stat)


def has(target: Target, found: os.stat_result) -> bool:
    """Whether the file of a `stat` result is there."""
    return target.stat is not None and os.path.samestat(target.stat, found)


def is_null(target: Target) -> bool:
    """Whether it is ``/dev/null``, which several outputs may share."""
    return target.stat is not None and os.path.samestat(target.stat, os.stat(os.devnull))


def describe(path: AnyPath, error: OSError | ValueError) -> OutputError:
    """The error about an output that cannot be written, with the reason."""
    name = "standard output" if os.fspath(path) == STDOUT else os.fspath(path)
    return OutputError(f"{name} cannot be written: {explain(error)}")
