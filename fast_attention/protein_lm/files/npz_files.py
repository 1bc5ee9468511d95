"""Reading ``.npz`` files that may be damaged, or come from other people."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import one_line, open_plain
from fast_attention.protein_lm.machine_failures import machine_failure

_SUFFIX = ".npy"
_PIECE = 2**20


def read_npz(
    path: Path,
    remedy: str,
    *,
    limit: int,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Reads arrays of a file, comparing their checksums.

    A file of a few bytes can name an array of any size, or be compressed to it: what it promises is
    compared before memory is allocated.

    Args:
      path: The file.
      remedy: What to do where it is absent or damaged.
      limit: The most bytes that the arrays together may have.
      expected: Names and shapes that the arrays must have; None takes any.
      names: Which arrays to read; None reads all. The others are not looked at.

    Raises:
      RunError: If it is absent or damaged, or has other arrays; or, as another error, if it cannot
        be read for lack of memory or a failure of the disk.
    """
    if not path.exists():
        raise RunError(f"{path} is missing: {remedy}")
    open_plain(path).close()
    try:
        with zipfile.ZipFile(path) as archive:
            promised = sum(member.file_size for member in _members(archive, names))
        if promised > limit:
            raise ValueError(f"it declares {promised:,} bytes, at most {limit:,} are expected")
        check_npz(path, names)
        arrays = read_arrays(path, names)
    except Exception as error:
        if (reason := machine_failure(error)) is not None:
            raise RunError(f"{path} cannot be read now: {reason}") from error
        raise RunError(f"{path} is damaged ({one_line(error)}): {remedy}") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    for name in [*(expected or {}), *(shapes if expected else {})]:
        there, wanted = (found.get(name, "absent") for found in (shapes, expected or {}))
        if there != wanted:
            raise RunError(
                f"{path} fits another model: {name!r:.80} is {there}, expected {wanted}: {remedy}"
            )
    return arrays


def read_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of a file, of names or all of them; anything may be raised if it is damaged."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in (stored.files if names is None else names)}


def check_npz(path: Path, names: Collection[str] | None = None) -> None:
    """Raises an error if arrays of a file are damaged, without keeping them in memory.

    What is raised depends on the damage: ValueError, `zipfile.BadZipFile` and others.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        for member in _members(archive, names):
            _check_checksum(archive, member)
            _check_header(archive, member)


def _members(archive: zipfile.ZipFile, names: Collection[str] | None) -> list[zipfile.ZipInfo]:
    found = archive.infolist()
    if names is None:
        return found
    return [member for member in found if member.filename.removesuffix(_SUFFIX) in names]


def _check_checksum(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    try:
        with archive.open(member) as stream:
            # The end of the stream compares it.
            while stream.read(_PIECE):
                pass
    except zipfile.BadZipFile as error:
        raise ValueError(f"the checksum of {member.filename[:60]!r} is wrong") from error


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Compares the size that an array claims with what is there, before it is allocated."""
    if not member.filename.endswith(_SUFFIX):
        raise ValueError(f"{member.filename[:60]!r} is no array")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, kind = read(stream)
        if kind.hasobject or math.prod(shape) * kind.itemsize != member.file_size - stream.tell():
            raise ValueError(f"the array {member.filename[:60]!r} does not have its declared size")
