"""What is looked at in the files of a checkpoint before a library reads them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import tensorstore

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import MAX_BYTES, check_fields, read_json
from fast_attention.protein_lm.runs.run_folder import check_links

# Files that orbax reads whole, before anything in them can be compared.
_TEXT_FILES = ("metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding", "process_0")

# Trained numbers hardly compress, zeros do.
_MAX_COMPRESSION = 256
_SMALL = 2**28

_ABOUT = {"progress": dict, "arrays": dict[str, str], "sums": dict[str, int], "seal": int}
_PROGRESS = {
    "iterator": dict | None,
    "batch_size": int,
    "tokens": int,
    "seconds": float,
    "pending": list[dict[str, float]] | None,
    "lowest_loss": float | None,
    "best_step": int | None,
    "best_loss": float | None,
}
"""Types of the fields of `checkpoints.Progress` as JSON."""


def check(folder: Path, arrays: Any = None) -> None:
    """Checks the files of a checkpoint before any is read, and before memory is allocated.

    Args:
      folder: Of the checkpoint.
      arrays: What is to be read, as `jax.ShapeDtypeStruct`; None reads no arrays.

    Raises:
      RunError: At a link that leads out of the folder, a device or a pipe.
      ValueError: If a description is larger than any that was written, or the files are far too
        small for the arrays.
    """
    check_links(folder, folder)
    there = 0
    for path in folder.rglob("*"):
        size = path.stat().st_size if path.is_file() else 0
        there += size
        if path.name in _TEXT_FILES and size > MAX_BYTES:
            raise ValueError(f"{path.name} has {size:,} bytes; at most {MAX_BYTES:,} are expected")
    leaves = jax.tree.leaves(arrays)
    wanted = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if wanted > _SMALL + _MAX_COMPRESSION * there:
        raise ValueError(f"its {there:,} bytes cannot hold {wanted:,} bytes of arrays")


def check_chunks(folder: Path) -> None:
    """Checks that no array of an item of a checkpoint is stored in chunks larger than itself.

    A chunk is decompressed as a whole, so that a few bytes could take any amount of memory. If the
    files are damaged, anything may be raised.

    Args:
      folder: Of the item, an OCDBT database of zarr arrays.

    Raises:
      ValueError: If it is no such database, or at a larger chunk.
    """
    if read_json(folder / "_METADATA").get("use_ocdbt") is not True:
        raise ValueError(f"{folder.name}/_METADATA: use_ocdbt is not true")
    # The driver takes no relative path and no "..".
    base = {"driver": "file", "path": f"{os.path.realpath(folder)}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        if key.endswith((b"/.zarray", b"/zarr.json")):
            about = json.loads(store.read(key).result().value)
            if "chunk_grid" in about:
                about["chunks"] = about["chunk_grid"]["configuration"]["chunk_shape"]
            if math.prod(about["chunks"]) > max(math.prod(about["shape"]), 1):
                raise ValueError(f"{key.decode()[:80]!r} has chunks larger than the array")


def check_about(folder: Path, about: Any) -> None:
    """Checks what stands beside the arrays of a checkpoint: names and types.

    Args:
      folder: Of the checkpoint.
      about: The content of its JSON file.

    Raises:
      RunError: At an unknown or missing name, or a value of another type.
    """
    path = folder / "about" / "metadata"
    check_fields(path, "", about, _ABOUT)
    progress = check_fields(path, "progress", about["progress"], _PROGRESS)
    if progress["batch_size"] < 1:
        raise RunError(
            f"{path}: progress.batch_size is {progress['batch_size']}; expected 1 or more"
        )
