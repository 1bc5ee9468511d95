"""Plots of recorded attention weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_attention.diagnostics.plots import make_figure
from fast_attention.models.recording import Recording


def plot_recordings(
    recordings: Recording | Sequence[Recording],
    path: str | Path,
    *,
    row: int = 0,
    head: int | None = None,
) -> None:
    """Plots the weights of every head as a matrix: queries downwards, keys to the right.

    For hashed attention, a strip of colours on the left shows the buckets of queries in the first
    round. Needs matplotlib, which is part of ``fast-attention[protein]``.

    Args:
      recordings: Result of `record`, or a part of it.
      path: Output file; the suffix selects the format.
      row: Which element of the batch.
      head: Which head of each group; None is all.

    Raises:
      ImportError: Without matplotlib.
      ValueError: If there is nothing to draw, or no such row or head.
    """
    recordings = [recordings] if isinstance(recordings, Recording) else list(recordings)
    squares = [
        (recording, index) for recording in recordings for index in _heads(recording, row, head)
    ]
    if not squares:
        raise ValueError("There are no recordings to draw: the model has no attention layers.")
    columns = math.ceil(math.sqrt(len(squares)))
    lines = math.ceil(len(squares) / columns)
    figure = make_figure(3.2 * columns, 2.8 * lines)
    for number, (recording, index) in enumerate(squares, 1):
        _draw(figure.add_subplot(lines, columns, number), recording, row, index)
    figure.savefig(path, dpi=120)


def _heads(recording: Recording, row: int, head: int | None) -> Sequence[int]:
    rows, heads = recording.weights.shape[:2]
    if not 0 <= row < rows:
        raise ValueError(f"row must be in the batch, 0 to {rows - 1}, got {row}.")
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"head must be in the group, 0 to {heads - 1}, got {head}.")
    return range(heads) if head is None else (head,)


def _draw(axes: Any, recording: Recording, row: int, head: int) -> None:
    weights = np.asarray(recording.weights[row, head])
    low = min(0.0, float(weights.min()))
    image = axes.imshow(weights, cmap="viridis", vmin=low, aspect="auto")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("attention weight", fontsize=5)
    bar.ax.tick_params(labelsize=5)
    for axis in ("x", "y"):
        axes.locator_params(axis=axis, integer=True)
    axes.set_xlabel("key (position)", fontsize=5)
    axes.set_ylabel("query (position)", fontsize=5)
    if recording.buckets is not None:
        buckets = np.asarray(recording.buckets[row, head, 0, : len(weights), None])
        strip = axes.inset_axes((-0.08, 0, 0.05, 1))
        strip.imshow(buckets, cmap="tab20", aspect="auto", interpolation="nearest")
        strip.set_axis_off()
    path = ".".join(map(str, recording.path))
    axes.set_title(f"{path}\ngroup {recording.group}, head {head}", fontsize=6)
    axes.tick_params(labelsize=5)
