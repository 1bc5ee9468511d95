"""Temporary files and folders beside an output, and those that killed processes have left.

A temporary name is locked (`flock`) as long as its process writes it, and the operating system
gives the lock up when the process ends, however that ends. So a name that can be locked belongs to
nobody, and the next process that writes the same output removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """Creates an empty file beside a target, and removes it at the end if it is still there.

    Unlike `tempfile`, this lets the umask decide who can read the file.

    Args:
      target: The file that the temporary one is to replace.
    """
    with _temporary(target, lambda path: path.touch(exist_ok=False), Path.unlink) as path:
        yield path


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Creates an empty folder beside a target, and removes it at the end if it is still there.

    Args:
      target: The folder that the temporary one is to become.
    """
    with _temporary(target, Path.mkdir, _remove_folder) as path:
        yield path


def temporary_name(target: Path) -> Path:
    """A new name beside a target."""
    return target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}.tmp")


def remove_stale(target: Path) -> None:
    """Removes temporary files and folders of a target whose processes have ended.

    What cannot be looked at, locked or removed stays.

    Args:
      target: The file or folder that they were to become.
    """
    pattern = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if pattern.fullmatch(name):
                _remove_unlocked(target.with_name(name))


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    # Shortened, as file systems limit the length of names.
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}."


@contextlib.contextmanager
def _temporary(
    target: Path, create: Callable[[Path], None], remove: Callable[[Path], None]
) -> Iterator[Path]:
    remove_stale(target)
    lock, path = None, temporary_name(target)
    try:
        create(path)
        while (lock := _lock(path)) is None:
            path = temporary_name(target)
            create(path)
        yield path
    finally:
        with contextlib.suppress(OSError):
            remove(path)
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Locks a new file or folder; None if another process was about to remove it."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.path.samestat(os.fstat(lock), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        there = False
    except OSError:
        return lock  # A file system without locks, where it is not removed either.
    if there:
        return lock
    os.close(lock)
    return None


def _remove_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open(path, flags)
        try:
            kind = os.fstat(lock).st_mode
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(kind):
                shutil.rmtree(path)
            elif stat.S_ISREG(kind):
                path.unlink()
        finally:
            os.close(lock)
