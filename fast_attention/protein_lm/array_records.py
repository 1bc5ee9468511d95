"""What a checkpoint notes of its arrays, to recognise them when they are read back."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np


def describe(arrays: Any) -> dict[str, str]:
    """Dtype and shape of each array (or its abstract stand-in), by its dotted name."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(arrays).items()}


def checksums(arrays: Any) -> dict[str, int]:
    """The CRC-32 of the bytes of each array, by its dotted name."""
    return {
        name: zlib.crc32(np.ascontiguousarray(_on_host(leaf)).reshape(-1).view(np.uint8).data)
        for name, leaf in named(arrays).items()
    }


def find_unsound(arrays: Any) -> str | None:
    """The dotted name of an array with an infinity or what is not a number; None without one."""
    for name, leaf in named(arrays).items():
        if not np.isfinite(_on_host(leaf)).all():
            return name
    return None


def named(arrays: Any) -> dict[str, Any]:
    """Each array by its dotted name, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _on_host(leaf: Any) -> np.ndarray:
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
