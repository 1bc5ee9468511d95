"""What is looked at in the files of a checkpoint before a library reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from fast_attention.protein_lm.json_files import MAX_BYTES
from fast_attention.protein_lm.run_folder import check_links

# Files that orbax reads whole, before anything in them can be compared.
_TEXT_FILES = ("metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding", "process_0")

# Trained numbers hardly compress, zeros do.
_MAX_COMPRESSION = 256
_SMALL = 2**28


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
