"""Which chunk to take: that of the nearest shape in the rows of the device.

Shape letters: D head width, M features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from fast_attention.linear.chunked.chunk_table import CHUNKS, ORIGINS
from fast_attention.linear.devices import device_of_process, platform_of, usual_name
from fast_attention.linear.types import Inputs, Plan

FALLBACK = "cpu"
"""Platform whose rows serve one that has none."""

Row = tuple[str, bool, int, int]
"""Device, causal, D and M."""


class ChunkChoice(NamedTuple):
    """How a sequence is cut.

    Attributes:
      chunk_size: positions handled at once.
      unroll: chunks unrolled in the compiled loop.
    """

    chunk_size: int
    unroll: int


def nearest_row(
    device: str,
    causal: bool,
    head_dim: int,
    num_features: int,
    chunks: Mapping[Row, tuple[int, int, str]] = CHUNKS,
) -> Row:
    """Returns the row of a table that serves a shape on a device.

    Args:
      device: a kind, as JAX reports it or by its usual name, or a platform. The rows of the kind
        serve it ("NVIDIA H100" those that JAX calls "NVIDIA H100 80GB HBM3"); if there are none,
        those of its platform, or of the CPU.
      causal: causal or bidirectional attention.
      head_dim: D; near is what has a small ratio.
      num_features: M; the same. Of two equally near shapes the smaller one counts.
      chunks: the table.

    Raises:
      ValueError: if a width is below 1, or if there is no row.
    """
    if head_dim < 1 or num_features < 1:
        raise ValueError(
            f"head_dim and num_features must be at least 1, got {head_dim} and {num_features}."
        )

    def distance(row: Row) -> float:
        return abs(math.log(row[2] / head_dim)) + abs(math.log(row[3] / num_features))

    kind = usual_name(device)
    served = {name for name, *_ in chunks if kind == name or kind.startswith(f"{name} ")}
    names = sorted(served, key=len, reverse=True)
    for name in (*names, _platform(device), FALLBACK):
        rows = sorted(row for row in chunks if row[:2] == (name, causal))
        if rows:
            return min(rows, key=distance)
    raise ValueError(f"The table has no row of {device} or {FALLBACK} with causal={causal}.")


def _platform(device: str) -> str:
    try:
        return platform_of(device)
    except ValueError:
        return FALLBACK  # A device of an unknown kind.


def origin(row: Row) -> str:
    """Describes how a row of the package's table was found."""
    how = CHUNKS[row][2]
    return f"{how} for {row[0]}" + "".join(f", {x}" for x in ORIGINS.get((row[0], how), ()))


def planned_row(plan: Plan, inputs: Inputs) -> Row:
    """Returns the row for a call: of the plan's kind of device, or of this process's devices."""
    head_dim = inputs.key.shape[-1]
    features = plan.feature_map.num_features(inputs.parameters, head_dim)
    return nearest_row(plan.device_kind or device_of_process(), plan.causal, head_dim, features)


def planned_chunk(plan: Plan, inputs: Inputs) -> ChunkChoice:
    """Returns what the plan asks for, completed by the row for the call."""
    chunk, unroll, _ = CHUNKS[planned_row(plan, inputs)]
    return ChunkChoice(plan.chunk_size or chunk, plan.unroll or unroll)
