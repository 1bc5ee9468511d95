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


def plot_head_errors(
    ratios: Any, path: Any, matrices: Mapping[str, Any] | None = None, title: str = ""
) -> None:
    """Draws the error of every head of a model in units of that of uniform attention.

    Args:
      ratios: ``[layers, heads]``: 0 is exact, 1 and above (red) no better than knowing nothing;
        NaN (grey) is a head that a layer does not have.
      path: The picture, in the format of its suffix; or a binary stream, for PNG.
      matrices: ``[rows, keys]`` by name, drawn beside on one scale of colours, such as one head of
        ``attention_matrix`` and its exact one.
      title: Of the first panel.

    Raises:
      ImportError: Without matplotlib.
    """
    values = np.asarray(ratios, np.float64)
    squares = {name: np.asarray(matrix, np.float64) for name, matrix in (matrices or {}).items()}
    width = max(3.5, 1.5 + 0.5 * values.shape[1])
    figure = _figure(width + 3.2 * len(squares), max(3.2, 1.2 + 0.4 * values.shape[0]))
    grid = figure.subplots(
        1, 1 + len(squares), squeeze=False, width_ratios=[width, *(3.2 for _ in squares)]
    )[0]
    axes = grid[0]
    axes.set_facecolor("0.85")
    # White is at 1: what is red there says less than nothing.
    image = axes.imshow(values, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value - 1) > 0.7 else "black"
            place = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            axes.text(column, row, f"{value:.2f}", **place)
    axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
    axes.set_yticks(range(values.shape[0]), range(1, values.shape[0] + 1))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=8)
    figure.colorbar(image, ax=axes, label="error / error of uniform attention")
    for axes, (name, square) in zip(grid[1:], squares.items(), strict=True):
        # Rows sum up to one, over few keys or many: the exact matrix sets the scale.
        high = float(np.quantile(next(iter(squares.values())), 0.995))
        axes.imshow(square, cmap="viridis", vmin=0, vmax=high or 1, aspect="auto")
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        axes.tick_params(labelsize=6)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install 'fast-attention[protein]', or matplotlib alone."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
