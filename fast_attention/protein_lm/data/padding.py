"""Padding of integer-encoded sequences, and what follows from it.

Letters: N sequences, T length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def pad_sequences(
    sequences: Sequence[Any] | np.ndarray, length: int | None = None, value: int | None = None
) -> np.ndarray:
    """Returns the sequences as rows of one int32 array ``[N, length]``, padded after their end.

    Args:
      sequences: integer sequences of any lengths.
      length: length of the rows; None takes that of the longest sequence.
      value: what to pad with; None takes the largest id of all sequences plus one.

    Raises:
      ValueError: if a sequence is longer than ``length``: nothing is cut off silently.
    """
    longest = max((len(sequence) for sequence in sequences), default=0)
    if length is None:
        length = longest
    if longest > length:
        raise ValueError(
            f"A sequence of {longest} tokens does not fit into {length}. Crop it first, or raise "
            "the length."
        )
    if value is None:
        value = 1 + max((int(np.max(row)) for row in sequences if len(row)), default=-1)
    padded = np.full((len(sequences), length), value, np.int32)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def unpad_sequences(sequences: Sequence[Any] | np.ndarray, value: int) -> list[np.ndarray]:
    """Returns every sequence without ``value``, wherever in it that stands."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    return [array[array != value] for array in arrays]


def sequences_end_with_value(sequences: Any, value: int, axis: int = -1) -> np.ndarray:
    """Tells which sequences have ``value`` as a suffix only: nothing else follows it.

    Args:
      sequences: integers ``[..., T, ...]``.
      value: the id to look for; a sequence without it counts as having an empty suffix of it.
      axis: the axis of T.
    """
    found = np.asarray(sequences) == value
    return np.asarray(np.all(np.diff(found.astype(np.int8), axis=axis) >= 0, axis))


def strip_sequences_at_value(sequences: Sequence[Any] | np.ndarray, value: int) -> list[np.ndarray]:
    """Returns every sequence with all that follows the first ``value`` set to ``value``."""
    return [
        np.where(np.maximum.accumulate(np.asarray(sequence) == value), value, sequence)
        for sequence in sequences
    ]
