"""Arrays of a published folder: safetensors, in one or several files, or PyTorch's."""

from __future__ import annotations

from pathlib import Path

from fast_attention.models.originals.checkpoint_arrays import (
    StoredArray,
    read_json_object,
    read_safetensors,
    shown,
)
from fast_attention.models.originals.torch_files import read_torch

_INDEX = "model.safetensors.index.json"


def read_folder(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a folder as published: safetensors, in one or several files, or ``.bin``.

    Raises:
      ValueError: If there are no arrays, or a file is damaged.
      OSError: If a file cannot be read.
    """
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
    places = read_json_object(path).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{path} has no weight_map")
    files: dict[str, dict[str, StoredArray]] = {}
    found: dict[str, StoredArray] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise ValueError(f"{path} names the file {shown(file)}; expected one beside it")
        if file not in files:
            if not (folder / file).is_file():
                raise ValueError(f"{path} names {file}, which is not there: fetch it, too")
            files[file] = read_safetensors(folder / file)
        if name not in files[file]:
            raise ValueError(f"{path} places {shown(name)} in {file}, which does not have it")
        found[name] = files[file][name]
    return found
