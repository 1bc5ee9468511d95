"""Arrays of checkpoint files, and those of safetensors files.

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
            raise damaged(path, f"its header cannot have {size} bytes")
        described = json_object(path, file.read(size))
    described.pop("__metadata__", None)
    data = 8 + size
    found = {name: _stored(path, name, entry, data, total) for name, entry in described.items()}
    end = 0
    for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            raise damaged(path, f"{shown(name)} does not begin where another array ends")
        end = entry["data_offsets"][1]
    if data + end != total:
        raise damaged(path, f"{total - data - end} bytes belong to no array")
    return found


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
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind not in _SAFETENSORS_TYPES:
            raise ValueError(
                f"{path}: {shown(name)} has numbers of the type {shown(kind)}, which is not read: "
                "convert them to F32, F16 or BF16"
            )
        raise damaged(path, f"{shown(name)} is described as {shown(entry)}")
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
        raise damaged(path, "it ends inside an array")
    return values


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that is a JSON object.

    Raises:
      ValueError: If it is larger than any description, or no such file.
    """
    if path.stat().st_size > MAX_HEADER:
        raise ValueError(f"{path} is too large for a description")
    return json_object(path, path.read_bytes())


def json_object(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object; anything else is a ValueError that names the file."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise damaged(path, "its description is not JSON") from None
    if not isinstance(value, dict):
        raise damaged(path, "its description is not a JSON object")
    return value


def damaged(path: Path, reason: str) -> ValueError:
    """The error of a file that is not as it was written."""
    return ValueError(f"{path} is damaged: {reason}; fetch it again")


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
