"""Arrays of published checkpoints: safetensors, also in several files, and PyTorch's zip files.

Nothing is executed and PyTorch is not needed. Arrays are read one at a time, when they are asked
for, so that no more than one of them is in memory beside the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

MAX_HEADER = 100 * 2**20
"""Bytes of the longest description of arrays that is read, as in the safetensors library."""

_SAFETENSORS_TYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
_INDEX = "model.safetensors.index.json"


class StoredArray(NamedTuple):
    """An array in a file.

    Attributes:
      shape: Its shape.
      dtype: Its type in the file.
      read: Reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


def read_safetensors(path: Path) -> dict[str, StoredArray]:
    """The arrays of a ``.safetensors`` file by name; the values are read later.

    Raises:
      ValueError: If the file is damaged; the message names it.
      OSError: If it cannot be read.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MAX_HEADER, total - 8):
            raise ValueError(f"{path} is damaged: its header cannot have {size} bytes")
        described = _json_object(path, file.read(size))
    described.pop("__metadata__", None)
    data = 8 + size
    return {name: _stored(path, name, entry, data, total) for name, entry in described.items()}


def _stored(path: Path, name: str, entry: Any, data: int, total: int) -> StoredArray:
    """An array of a safetensors file, from its entry in the header."""
    try:
        dtype = np.dtype(_SAFETENSORS_TYPES[entry["dtype"]])
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        fits = all(type(n) is int and n >= 0 for n in numbers) and data + end <= total
        fits = fits and end - begin == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged: {name} is described as {_shown(entry)}")
    start, count = data + begin, math.prod(shape)

    def read() -> np.ndarray:
        with path.open("rb") as file:
            return read_values(file, path, start, dtype, count).reshape(shape)

    return StoredArray(tuple(shape), dtype, read)


def read_values(
    file: BinaryIO, path: Path, start: int, dtype: np.dtype[Any], count: int
) -> np.ndarray:
    """Reads ``count`` numbers of a file from byte ``start``.

    Raises:
      ValueError: If the file ends before.
    """
    values = np.empty(count, dtype)
    file.seek(start)
    if file.readinto(values.view(np.uint8)) != values.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"{path} is damaged: it ends inside an array")
    return values


def read_folder(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a folder as published: safetensors, in one or several files, or ``.bin``.

    Raises:
      ValueError: If there are no arrays, or a file is damaged.
      OSError: If a file cannot be read.
    """
    from fast_attention.models.originals.torch_files import read_torch

    single = folder / "model.safetensors"
    if single.is_file():
        return read_safetensors(single)
    if (folder / _INDEX).is_file():
        return _read_index(folder)
    for name in ("pytorch_model.bin", "model.pt"):
        if (folder / name).is_file():
            return read_torch(folder / name).arrays
    raise ValueError(
        f"{folder} has no arrays: expected model.safetensors, {_INDEX} or pytorch_model.bin"
    )


def _read_index(folder: Path) -> dict[str, StoredArray]:
    path = folder / _INDEX
    if path.stat().st_size > MAX_HEADER:
        raise ValueError(f"{path} is too large for an index")
    places = _json_object(path, path.read_bytes()).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{path} has no weight_map")
    files: dict[str, dict[str, StoredArray]] = {}
    found: dict[str, StoredArray] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise ValueError(f"{path} names the file {_shown(file)}; expected one beside it")
        if file not in files:
            if not (folder / file).is_file():
                raise ValueError(f"{path} names {file}, which is not there: fetch it, too")
            files[file] = read_safetensors(folder / file)
        if name not in files[file]:
            raise ValueError(f"{path} places {_shown(name)} in {file}, which does not have it")
        found[name] = files[file][name]
    return found


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: its description is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: its description is not a JSON object")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
