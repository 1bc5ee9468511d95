"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_REMEDIES = {
    errno.ENOENT: "its folder does not exist: make it first",
    errno.ENOTDIR: "its folder is a file: choose another name",
    errno.EISDIR: "there is a folder of this name: choose another name",
    errno.ENOSPC: "the disk is full: make room, or write elsewhere",
    errno.EDQUOT: "your share of the disk is used up: make room, or write elsewhere",
    errno.EFBIG: "the file is larger than is allowed here: write elsewhere",
    errno.EACCES: "permission denied: write elsewhere",
    errno.EPERM: "permission denied: write elsewhere",
    errno.EROFS: "the folder is read-only: write elsewhere",
    errno.ENAMETOOLONG: "the name is too long: choose another",
}


class OutputError(OSError):
    """A file cannot be written; the message names it, says why and what to do."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the temporary path of a file that takes the place of ``path`` when it is written.

    It does so when the ``with`` block ends without an error; otherwise an old file stays as it
    was, and nothing else is left.

    Args:
      path: the file to write or to replace.

    Raises:
      OutputError: if it cannot be written.
    """
    path = Path(path)
    check_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, (OutputError, BrokenPipeError)) or error.filename not in (
            None,
            str(temporary),
        ):
            raise
        raise _describe(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises OutputError if a file surely cannot be written; ask before long work."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        if not path.name:
            raise FileNotFoundError(errno.ENOENT, "")
        folder = path.parent
        folder.stat()
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "")
    except OSError as error:
        raise _describe(path, error) from error


def _describe(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {explain(error)}")


def explain(error: OSError) -> str:
    """Why something cannot be written, and what to do."""
    return _REMEDIES.get(error.errno or 0, error.strerror or str(error))


def printable(text: str) -> str:
    r"""Writes tabs, line ends and other controls as ``\t``, ``\n`` and so on: one field of a table.

    Ids and descriptions of records that were read have none; file names may have any.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
