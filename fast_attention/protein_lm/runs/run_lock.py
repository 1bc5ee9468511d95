"""A lock on the folder of a run, so that only one process trains there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_targets import OutputError, explain
from fast_attention.protein_lm.runs.run_folder import RunFolder

# What a file system that has no locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold_run(folder: RunFolder) -> Iterator[None]:
    """Locks the folder of a run until the ``with`` block ends; creates the folder when absent.

    The lock is the operating system's (`flock`), on a file that names the host and the process. It
    ends with the process, however that ends, so that the file of a killed process is no lock. The
    file is removed at the end, and so is a folder that was created here and has stayed empty.

    Args:
      folder: Of the run.

    Raises:
      OutputError: If the folder cannot be written to.
      RunError: If another process holds the lock, or the path is not a folder.
    """
    made = _make(folder.path)
    lock: int | None = None
    try:
        lock = _acquire(folder)
        yield
    finally:
        if lock is not None:
            # Before the lock is given up: its file may belong to another process afterwards.
            with contextlib.suppress(OSError):
                folder.lock.unlink()
            os.close(lock)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _make(path: Path) -> list[Path]:
    """Creates a folder; returns what had to be created, the innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        if path.is_symlink() and not path.exists():
            raise RunError(
                f"{path} is a link to {os.readlink(path)}, which does not exist: create that folder"
            ) from None
        raise RunError(f"{path} is not a folder: give the run a folder of its own") from None
    except OSError as error:
        raise _unwritable(path, error) from error
    return missing


def _acquire(folder: RunFolder) -> int:
    while True:
        try:
            # A link would lead to a file that is none of the run's.
            lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise _unwritable(folder.path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(lock)
            os.close(lock)
            raise RunError(
                f"{folder.path} is in use: {holder} trains there. Wait until it has ended, stop "
                "it, or give another --work_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise _unwritable(folder.path, error) from error
            print(
                f"warning: the file system of {folder.path} has no locks: make sure that no other "
                "process trains there",
                file=sys.stderr,
            )
        # Whoever held the lock until now may have removed the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder.lock)):
                _sign(lock)
                return lock
        os.close(lock)


def _sign(lock: int) -> None:
    about = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(lock, 0)
    os.pwrite(lock, (json.dumps(about) + "\n").encode(), 0)


def _holder(lock: int) -> str:
    try:
        about = json.loads(os.pread(lock, 4096, 0))
        return f"process {about['process']} on host {about['host']} (since {about['since']})"
    except (ValueError, KeyError, TypeError):
        # It has the lock, and has not written its name yet.
        return "another process"


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written to: {explain(error)}")
