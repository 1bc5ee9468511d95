"""Where every output is opened: plain files, folders, devices, named pipes and standard output.

`open_output` writes a plain file under a temporary name on the same file system and renames it when
it is complete. Devices, named pipes and open descriptors (``-``, ``/dev/stdout``, ``/dev/fd/3``)
are written directly. `open_output_folder` does for a folder what `open_output` does for a file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

AnyPath = str | os.PathLike[str]

STDOUT = "-"
"""The name of standard output."""

_REMEDIES = {
    errno.ENOENT: "its folder does not exist: create it first",
    errno.ENOTDIR: "its folder is a file: choose another name",
    errno.EISDIR: "it is a folder: choose another name",
    errno.ENOSPC: "the disk is full: make room, or write elsewhere",
    errno.EDQUOT: "your disk quota is used up: make room, or write elsewhere",
    errno.EFBIG: "the file is larger than is allowed here: write elsewhere",
    errno.EACCES: "permission denied: write elsewhere",
    errno.EPERM: "permission denied: write elsewhere",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.ENAMETOOLONG: "the name is too long: choose another",
    errno.ELOOP: "its symbolic links form a loop: choose another name",
}


class OutputError(OSError):
    """A file cannot be written; the message names it, says why and what to do."""


class _Target(NamedTuple):
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


@contextlib.contextmanager
def open_output(path: AnyPath, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """Opens an output for writing bytes.

    A plain file is written as a temporary file beside the target of all symbolic links. When the
    ``with`` block ends without an exception, it is synchronized to disk and renamed; otherwise it
    is deleted, and an existing file stays as it was. A new file has the permissions that the umask
    leaves, a replaced one keeps its own.

    Anything that is not a plain file is written directly.

    Args:
      path: The file; ``-`` is standard output.
      seekable: Whether the file is read, sought or opened again by its ``name``. What is written
        directly is then collected in a temporary file and copied at the end.

    Yields:
      The open file. If it is seekable, a library may also write to its ``name`` or replace that.

    Raises:
      OutputError: If it cannot be written.
    """
    check_output(path)
    target = _resolve(path)
    write = _open_plain if not target.special else _open_copied if seekable else _open_direct
    used = [str(path), str(target.path)]
    try:
        with write(target, used) as file:
            yield file
    except OSError as error:
        if isinstance(error, (OutputError, BrokenPipeError)) or error.filename not in (None, *used):
            raise
        raise _describe(path, error) from error


@contextlib.contextmanager
def _open_plain(target: _Target, used: list[str]) -> Iterator[BinaryIO]:
    temporary = _temporary_name(target.path)
    used.append(str(temporary))
    file = None
    try:
        # Unlike `tempfile`, this lets the umask decide who can read the file.
        file = temporary.open("x+b")
        if target.stat is not None:
            os.chmod(temporary, stat.S_IMODE(target.stat.st_mode))
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        yield file
        file.close()
        # A library may have put another file, with a mode of its own, in place of ours.
        with open(temporary, "rb") as written:
            os.fchmod(written.fileno(), mode)
            if target.stat is not None and os.geteuid() == 0:
                os.fchown(written.fileno(), target.stat.st_uid, target.stat.st_gid)
            os.fsync(written.fileno())
        os.replace(temporary, target.path)
        _sync_folder(target.path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def _open_direct(target: _Target, used: list[str]) -> Iterator[BinaryIO]:
    if target.descriptor is not None:
        # What was printed before comes before.
        sys.stdout.flush()
        file = os.fdopen(os.dup(target.descriptor), "wb")
    else:
        file = target.path.open("wb")
    try:
        yield file
        file.close()
    finally:
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def _open_copied(target: _Target, used: list[str]) -> Iterator[BinaryIO]:
    with tempfile.TemporaryDirectory(prefix="protein-lm.") as folder:
        path = Path(folder, "output")
        used.append(str(path))
        with path.open("x+b") as file:
            yield file
        with path.open("rb") as written, _open_direct(target, used) as direct:
            shutil.copyfileobj(written, direct, 1 << 20)


@contextlib.contextmanager
def open_output_folder(path: AnyPath, *, last: str) -> Iterator[Path]:
    """Gives a temporary folder whose files become those of a folder when they are complete.

    It lies beside the target. When the ``with`` block ends without an exception, it is renamed, or
    its files replace those in the folder that is there; otherwise it is deleted.

    Args:
      path: The folder; missing folders above it are created.
      last: The file whose presence says that the folder is complete, which is moved last.

    Raises:
      OutputError: If the folder cannot be written.
    """
    check_output_folder(path)
    target = Path(os.path.realpath(path))
    temporary = _temporary_name(target)
    above: list[Path] = []
    try:
        for folder in reversed(target.parents):
            if not folder.exists():
                folder.mkdir()
                above.append(folder)
        temporary.mkdir()
        yield temporary
        if not target.exists():
            os.rename(temporary, target)
        else:
            with contextlib.suppress(FileNotFoundError):
                # Old and new files together are incomplete.
                (target / last).unlink()
            for name in sorted(os.listdir(temporary), key=lambda name: (name == last, name)):
                os.replace(temporary / name, target / name)
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise OutputError(str(error).replace(str(temporary), str(path))) from error
        if not str(error.filename).startswith((str(temporary), str(target))):
            raise
        raise _describe(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in reversed(above):
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_file(path: AnyPath, content: str | bytes) -> None:
    """Writes a file at once, see `open_output`."""
    with open_output(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: AnyPath, value: Any) -> None:
    """Writes a value as JSON, see `json_text` and `open_output`."""
    write_file(path, json_text(value, indent=1) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """Formats a value as JSON; NaN and infinite numbers, which JSON lacks, become ``null``."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def check_outputs(outputs: Mapping[str, AnyPath | None], inputs: Iterable[AnyPath] = ()) -> None:
    """Checks all outputs of a command before its work.

    Args:
      outputs: Paths by the name of their option; None is an option that was not given.
      inputs: Files that the command reads.

    Raises:
      OutputError: If an output cannot be written, is the same file as another one or as an input,
        whatever the two are called.
    """
    for path in outputs.values():
        if path is not None:
            check_output(path)
    given = {name: _resolve(path) for name, path in outputs.items() if path is not None}
    names = list(given)
    for number, name in enumerate(names):
        for other in names[:number]:
            if _same(given[name], given[other]) and not _is_null(given[name]):
                raise OutputError(
                    f"{other} and {name} name the same file, {outputs[name]}: give each output a "
                    "file of its own"
                )
    for path in inputs:
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            continue  # Whoever reads it says so.
        for name, target in given.items():
            if stat.S_ISREG(found.st_mode) and _has(target, found):
                raise OutputError(
                    f"{name} {outputs[name]} is the same file as the input {os.fspath(path)}, "
                    "which would be overwritten: write to another file"
                )


def check_output(path: AnyPath) -> None:
    """Raises OutputError if a file cannot be written; for use before long work."""
    try:
        target = _resolve(path)
        if target.descriptor is not None:
            os.fstat(target.descriptor)
            return
        if not os.fspath(path) or target.stat is not None and stat.S_ISDIR(target.stat.st_mode):
            raise IsADirectoryError(errno.EISDIR, "")
        if os.fspath(path).endswith(os.sep):
            raise IsADirectoryError(errno.EISDIR, "")
        if target.stat is not None and not os.access(target.path, os.W_OK):
            raise PermissionError(errno.EACCES, "")
        if not target.special:
            _check_folder(target.path.parent, target.path.name)
    except (OSError, ValueError) as error:
        raise _describe(path, error) from error


def check_output_folder(path: AnyPath) -> None:
    """Raises OutputError if a folder cannot be created or filled; for use before long work."""
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{path} is not a folder: choose another name")
        folder = next(folder for folder in (target, *target.parents) if folder.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        _check_folder(folder)
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise _describe(path, error) from error


def status_stream(*outputs: AnyPath | None) -> TextIO:
    """Where a command prints what it did: stderr where one of its outputs is standard output."""
    try:
        standard = os.fstat(1)
    except OSError:
        return sys.stdout
    for path in outputs:
        if path is None:
            continue
        target = _resolve(path)
        if target.descriptor == 1 or (_has(target, standard) and not _is_null(target)):
            return sys.stderr
    return sys.stdout


def is_special(path: AnyPath) -> bool:
    """Whether an output is a device, a named pipe or standard output rather than a plain file."""
    return _resolve(path).special


def explain(error: OSError | ValueError) -> str:
    """Why something cannot be written, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    return _REMEDIES.get(number or 0) or getattr(error, "strerror", None) or str(error)


def printable(text: str) -> str:
    r"""Writes tabs, line ends and other control characters as ``\t``, ``\n`` and so on."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _resolve(path: AnyPath) -> _Target:
    text = os.fspath(path)
    descriptor = 1 if text == STDOUT else _descriptor(text)
    if descriptor is not None:
        try:
            return _Target(Path(text), descriptor, os.fstat(descriptor))
        except OSError:
            return _Target(Path(text), descriptor, None)
    try:
        real = Path(os.path.realpath(text))
        return _Target(real, None, os.stat(real))
    except FileNotFoundError:
        return _Target(real, None, None)
    except NotADirectoryError:
        return _Target(real, None, None)


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


def _same(one: _Target, other: _Target) -> bool:
    if one.stat is None or other.stat is None:
        return one.stat is other.stat and one.path == other.path
    return os.path.samestat(one.stat, other.stat)


def _has(target: _Target, found: os.stat_result) -> bool:
    return target.stat is not None and os.path.samestat(target.stat, found)


def _is_null(target: _Target) -> bool:
    return target.stat is not None and os.path.samestat(target.stat, os.stat(os.devnull))


def _check_folder(folder: Path, name: str = "") -> None:
    """Creates and deletes a file, which alone shows that a folder takes one."""
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "")
    if len(os.fsencode(name)) > os.pathconf(folder, "PC_NAME_MAX"):
        raise OSError(errno.ENAMETOOLONG, "")
    probe = _temporary_name(folder / "probe")
    try:
        probe.touch(exist_ok=False)
    except FileNotFoundError:
        # Such as in /proc.
        raise PermissionError(errno.EACCES, "") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _temporary_name(path: Path) -> Path:
    stem = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{stem}.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut; some file systems cannot, which is no failure."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _describe(path: AnyPath, error: OSError | ValueError) -> OutputError:
    name = "standard output" if os.fspath(path) == STDOUT else os.fspath(path)
    return OutputError(f"{name} cannot be written: {explain(error)}")
