"""PyTorch's checkpoint files (``.bin``, ``.pt``), read without PyTorch.

Such a file is a zip archive: ``data.pkl`` describes Python objects in pickle's language, and one
member a storage has the numbers. The description is read by an unpickler that knows the
constructors of tensors, ordered dictionaries and ``argparse.Namespace`` (fair-esm keeps its options
in one) and refuses every other name, so that no code runs.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fast_attention.models.originals.checkpoint_arrays import MAX_HEADER, StoredArray, damaged

_STORAGES: dict[str, Any] = {
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
}


class TorchFile(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: Tensors by name; of a dictionary with an entry "model" those of that.
      value: The whole object, tensors as `StoredArray`.
    """

    arrays: dict[str, StoredArray]
    value: Any


class Options:
    """Stands for ``argparse.Namespace``: its attributes. Each file has a subclass of its own."""


def read_torch(path: Path) -> TorchFile:
    """Reads a file that ``torch.save`` wrote, of PyTorch 1.6 or later.

    Raises:
      ValueError: If the file is damaged, of another kind, or holds other objects than tensors,
        numbers, text, lists and dictionaries; the message names the file.
      OSError: If it cannot be read.
    """
    with _damage_is_value_error(path), zipfile.ZipFile(path) as archive:
        value = _describe(path, archive)
    inner = value.get("model") if isinstance(value, dict) else None
    named = inner if isinstance(inner, dict) else value
    if not isinstance(named, dict):
        raise ValueError(f"{path} holds a {type(named).__name__}, not tensors by name")
    arrays = {
        name: x for name, x in named.items() if isinstance(x, StoredArray) and type(name) is str
    }
    if not arrays:
        raise ValueError(f"{path} holds no tensors by name")
    return TorchFile(arrays, value)


@contextlib.contextmanager
def _damage_is_value_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
        raise ValueError(
            f"{path} is damaged, or not a zip archive of PyTorch 1.6 or later: fetch it again, "
            "convert it with torch.save(torch.load(...)), or use the model's .safetensors file"
        ) from None
    except OSError as error:
        # Seeking to a position that a damaged directory names.
        if error.errno != errno.EINVAL:
            raise
        raise damaged(path, _line(error)) from None
    except (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OverflowError,
        RecursionError,
        TypeError,
        struct.error,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} cannot be read: {_line(error)}") from None


def _describe(path: Path, archive: zipfile.ZipFile) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    found = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
        raise ValueError(f"{path} is a zip archive, but not of PyTorch: it has no data.pkl")
    folder, info = found[0].removesuffix("data.pkl"), members[found[0]]
    if info.file_size > MAX_HEADER:
        raise ValueError(f"{path} describes its tensors in {info.file_size} bytes, too many")
    order = members.get(f"{folder}byteorder")
    if order is not None and order.file_size < 16 and archive.read(order).strip() != b"little":
        raise ValueError(f"{path} has numbers in big-endian order, which is not supported")
    text = archive.read(info)
    return _Unpickler(io.BytesIO(text), path, members, folder).load()


class _Storage(NamedTuple):
    path: Path
    member: zipfile.ZipInfo
    dtype: np.dtype[Any]
    count: int

    def read(self) -> np.ndarray:
        values = np.empty(self.count, self.dtype)
        view, done = memoryview(values.view(np.uint8).data), 0
        with (
            _damage_is_value_error(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open(self.member) as file,
        ):
            while done < len(view) and (piece := file.read(min(2**20, len(view) - done))):
                view[done : done + len(piece)] = piece
                done += len(piece)
        if done < len(view):
            raise damaged(self.path, "it ends inside a tensor")
        return values


class _Unpickler(pickle.Unpickler):
    """Knows the few names below; any other is an error.

    A pickle can set attributes of what it names, so it is given nothing that outlives the file, and
    types of numbers by name.
    """

    def __init__(
        self, file: io.BytesIO, path: Path, members: dict[str, zipfile.ZipInfo], folder: str
    ):
        super().__init__(file)
        self._path, self._members, self._folder = path, members, folder
        self._known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): type("Options", (Options,), {}),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *stored: _rebuild_tensor(*stored),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is none of the constructors of tensors; nothing was "
            "executed"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ``("storage", type, key, device, number of elements)``."""
        kind, dtype, key, _, count = pid
        dtype = np.dtype(_STORAGES[dtype])
        member = self._members.get(f"{self._folder}data/{key}")
        if kind != "storage" or member is None or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a tensor has no storage")
        if member.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("its tensors are compressed, which torch.save never does")
        if count * dtype.itemsize > member.file_size:
            raise pickle.UnpicklingError(f"the storage {key} is shorter than its tensors")
        return _Storage(self._path, member, dtype, count)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredArray:
    numbers = [offset, *shape, *stride]
    counts = len(shape) == len(stride) and all(type(n) is int and n >= 0 for n in numbers)
    if not isinstance(storage, _Storage) or not counts:
        raise pickle.UnpicklingError("a tensor is described wrongly")
    empty = 0 in shape
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if not empty and last >= storage.count:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    # Views with a stride of 0 could be larger than the file without end.
    if math.prod(shape) > storage.count:
        raise pickle.UnpicklingError("a tensor has more elements than its storage")

    def read() -> np.ndarray:
        if empty:
            return np.empty(shape, storage.dtype)
        values = storage.read()[offset:]
        steps = [step * values.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False)

    return StoredArray(tuple(shape), storage.dtype, read)


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
