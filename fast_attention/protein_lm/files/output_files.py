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
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fast_attention.protein_lm.files.output_targets import (
    STDOUT,
    AnyPath,
    OutputError,
    Target,
    check_descriptor,
    describe,
    has,
    is_null,
    resolve,
    same,
)
from fast_attention.protein_lm.files.temporaries import (
    temporary_file,
    temporary_folder,
    temporary_name,
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
    target = resolve(path)
    write = _open_plain if not target.special else _open_copied if seekable else _open_direct
    used = [str(path), str(target.path)]
    try:
        with write(target, used) as file:
            yield file
    except OSError as error:
        if isinstance(error, (OutputError, BrokenPipeError)) or error.filename not in (None, *used):
            raise
        raise describe(path, error) from error


@contextlib.contextmanager
def _open_plain(target: Target, used: list[str]) -> Iterator[BinaryIO]:
    with temporary_file(target.path) as temporary:
        used.append(str(temporary))
        file = temporary.open("r+b")
        try:
            if target.stat is not None:
                os.chmod(temporary, stat.S_IMODE(target.stat.st_mode))
            mode = stat.S_IMODE(os.stat(temporary).st_mode)
            yield file
            file.close()
        finally:
            with contextlib.suppress(OSError):
                file.close()
        # A library may have put another file, with a mode of its own, in place of ours.
        with open(temporary, "rb") as written:
            os.fchmod(written.fileno(), mode)
            if target.stat is not None and os.geteuid() == 0:
                os.fchown(written.fileno(), target.stat.st_uid, target.stat.st_gid)
            os.fsync(written.fileno())
        os.replace(temporary, target.path)
        _sync_folder(target.path.parent)


@contextlib.contextmanager
def _open_direct(target: Target, used: list[str]) -> Iterator[BinaryIO]:
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
def _open_copied(target: Target, used: list[str]) -> Iterator[BinaryIO]:
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

    It is beside the target. When the ``with`` block ends without an exception, it is renamed, or
    its files replace those in the folder that is there; otherwise it is deleted.

    Args:
      path: The folder; missing folders above it are created.
      last: The file whose presence means that the folder is complete; it is moved last.

    Raises:
      OutputError: If the folder cannot be written.
    """
    check_output_folder(path)
    target = Path(os.path.realpath(path))
    above: list[Path] = []
    try:
        for folder in reversed(target.parents):
            if not folder.exists():
                folder.mkdir()
                above.append(folder)
        with temporary_folder(target) as temporary:
            try:
                yield temporary
            except OutputError as error:
                raise OutputError(str(error).replace(str(temporary), str(path))) from error
            _put_in_place(temporary, target, last)
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        # Errors name the temporary folder, or the target.
        if Path(str(error.filename)).parts[: len(target.parent.parts)] != target.parent.parts:
            raise
        raise describe(path, error) from error
    finally:
        for folder in reversed(above):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _put_in_place(temporary: Path, target: Path, last: str) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    names = sorted(os.listdir(temporary), key=lambda name: (name == last, name))
    if last in names:
        with contextlib.suppress(FileNotFoundError):
            # Old and new files together are incomplete.
            (target / last).unlink()
    for name in names:
        os.replace(temporary / name, target / name)


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
    given = {name: resolve(path) for name, path in outputs.items() if path is not None}
    names = list(given)
    for number, name in enumerate(names):
        for other in names[:number]:
            if same(given[name], given[other]) and not is_null(given[name]):
                raise OutputError(
                    f"{other} and {name} name the same file, {outputs[name]}: give each output its "
                    "own file"
                )
    for path in inputs:
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            continue  # Reading it raises the error.
        for name, target in given.items():
            if stat.S_ISREG(found.st_mode) and has(target, found):
                raise OutputError(
                    f"{name} {outputs[name]} is the same file as the input {os.fspath(path)}, "
                    "which would be overwritten: write to another file"
                )


def check_output(path: AnyPath) -> None:
    """Raises OutputError if a file cannot be written; for use before long work."""
    try:
        target = resolve(path)
        if target.descriptor is not None:
            check_descriptor(target.descriptor)
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
        raise describe(path, error) from error


def check_output_folder(path: AnyPath) -> None:
    """Raises OutputError if a folder cannot be created or filled; for use before long work."""
    if os.fspath(path) == STDOUT:
        raise OutputError("- is standard output, but a folder is written: give its name")
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
        raise describe(path, error) from error


def printable(text: str) -> str:
    r"""Writes tabs, line ends and other control characters as ``\t``, ``\n`` and so on."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _check_folder(folder: Path, name: str = "") -> None:
    """Creates and deletes a file, which alone shows that a folder takes one."""
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "")
    if len(os.fsencode(name)) > os.pathconf(folder, "PC_NAME_MAX"):
        raise OSError(errno.ENAMETOOLONG, "")
    probe = temporary_name(folder / "probe")
    try:
        probe.touch(exist_ok=False)
    except FileNotFoundError:
        # Such as in /proc.
        raise PermissionError(errno.EACCES, "") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut; some file systems cannot, which is no failure."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
