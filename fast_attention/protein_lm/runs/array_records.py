"""What a checkpoint notes of its arrays, to recognise them when they are read back.

The arrays may be spread over the devices of several processes in any way. Each process looks at
what it holds, no array is gathered, and the record does not say how the arrays were divided.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fast_attention.arrays.dtypes import is_random_key
from fast_attention.protein_lm.distributed import process_arrays

# 2^32 divided by the golden ratio: successive multiples are far from each other.
_STRIDE = np.uint32(2654435769)


def describe(arrays: Any) -> dict[str, str]:
    """Dtype and shape of each array (or its abstract stand-in), by its dotted name."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(arrays).items()}


def differences(stored: dict[str, str], expected: dict[str, str]) -> str:
    """Says how the arrays that `describe` found differ from the expected ones; "" if they do not.

    Args:
      stored: Result of `describe`, as the arrays are.
      expected: The same of the model that they are for.
    """
    names = [name for name in stored | expected if stored.get(name) != expected.get(name)]
    if not names:
        return ""
    there, wanted = stored.get(names[0], "absent"), expected.get(names[0], "none")
    return (
        f"{names[0]} is {there} there, and the model expects {wanted} "
        f"({len(names)} such differences)"
    )


def checksums(arrays: Any) -> dict[str, int]:
    """A sum over the bits of each array, by its dotted name.

    The sum of w_i b_i modulo 2^32, where the b_i are the array's bytes as little-endian unsigned
    numbers of up to 32 bits, in row-major order, and w_i = (2654435769 i) | 1. As the weights are
    odd, no change of a single b_i goes unnoticed. A sum of parts is the same however the array is
    cut, so that each process adds up its own.

    All processes must call this together.
    """
    leaves = {name: _data(leaf) for name, leaf in named(arrays).items()}
    sums = np.zeros(len(leaves), np.uint32)
    for number, leaf in enumerate(leaves.values()):
        for index, part in _own_parts(leaf):
            sums[number : number + 1] += _weighted_sum(part, index, leaf.shape)
    total = process_arrays.add_up(sums) if _is_spread(leaves) else sums
    return dict(zip(leaves, total.tolist(), strict=True))


def seal(about: dict[str, Any]) -> int:
    """The CRC-32 of what is fit for JSON."""
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def find_unsound(arrays: Any) -> str | None:
    """The dotted name of an array with an infinity or what is not a number; None without one.

    All processes must call this together.
    """
    leaves = named(arrays)
    unsound = np.array(
        [
            any(not np.isfinite(part).all() for _, part in _own_parts(leaf))
            for leaf in leaves.values()
        ],
        np.int32,
    )
    total = process_arrays.add_up(unsound) if _is_spread(leaves) else unsound
    return next((name for name, count in zip(leaves, total, strict=True) if count), None)


def named(arrays: Any) -> dict[str, Any]:
    """Each array by its dotted name, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _is_spread(leaves: dict[str, Any]) -> bool:
    return any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves.values()
    )


def _own_parts(leaf: Any) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The parts of an array that this process reads, with their places; copies are left out."""
    if not isinstance(leaf, jax.Array):
        yield (slice(None),) * np.ndim(leaf), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def _weighted_sum(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.uint32:
    """The sum of `checksums` over one part of an array of `shape`."""
    size = part.dtype.itemsize
    # A number of more than 32 bits counts as several.
    words = max(size // 4, 1)
    bits = np.ascontiguousarray(part).reshape(-1).view(f"<u{min(size, 4)}")
    bits = bits.reshape(*part.shape, words)
    places = np.zeros((1,) * len(shape), np.uint32)
    for axis, (one, length) in enumerate(zip(index, shape, strict=True)):
        begin, end, _ = one.indices(length)
        along = np.arange(begin, end).astype(np.uint32)
        along = along.reshape((-1,) + (1,) * (len(shape) - axis - 1))
        places = places * np.uint32(length % 2**32) + along
    weights = (places[..., None] * np.uint32(words) + np.arange(words, dtype=np.uint32)) * _STRIDE
    return np.sum(bits.astype(np.uint32) * (weights | np.uint32(1)), dtype=np.uint32)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_random_key(leaf) else leaf
