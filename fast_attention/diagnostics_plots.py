"""Attention matrices and errors as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fast_attention.diagnostics import Recommendation


def plot_matrices(matrices: Mapping[str, Any], path: str | Path) -> None:
    """Draws attention matrices side by side, on one scale of colours.

    Args:
      matrices: ``[R, S]`` by name, such as one head of ``attention_matrix``.
      path: The picture, in the format of its suffix.

    Raises:
      ImportError: Without matplotlib.
      ValueError: If there is nothing to draw, or a matrix has more axes.
    """
    squares = {name: np.asarray(matrix, np.float64) for name, matrix in matrices.items()}
    if not squares or any(square.ndim != 2 for square in squares.values()):
        shapes = {name: square.shape for name, square in squares.items()}
        raise ValueError(f"Give one or more matrices [rows, keys], got {shapes}.")
    figure = _figure(3.0 * len(squares), 3.2)
    low = min(0.0, *(float(square.min()) for square in squares.values()))
    high = max(float(square.max()) for square in squares.values())
    for number, (name, square) in enumerate(squares.items(), 1):
        axes = figure.add_subplot(1, len(squares), number)
        axes.imshow(square, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    figure.savefig(path, dpi=120)


def plot_recommendation(recommendation: Recommendation, path: str | Path) -> None:
    """Draws error against the number of features; what is extrapolated is dashed.

    Args:
      recommendation: What ``recommend_features`` returned.
      path: The picture, in the format of its suffix.

    Raises:
      ImportError: Without matplotlib.
    """
    figure = _figure(4.5, 3.2)
    axes = figure.add_subplot()
    axes.loglog(*zip(*recommendation.measured, strict=True), marker="o", label="measured")
    if recommendation.extrapolated:
        ends = recommendation.measured[-1], (recommendation.features, recommendation.error)
        axes.loglog(*zip(*ends, strict=True), linestyle="--", marker="x", label="extrapolated")
    axes.set_xlabel("features M")
    axes.set_ylabel("relative error of the attention matrix")
    axes.legend()
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install 'fast-attention[protein]', or matplotlib alone."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
