"""Table and picture of what :mod:`.trained_model` measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import COLOURS, GREY, MARKERS, load_figure_class

LABELS = {
    "favor+": "FAVOR+",
    "hedgehog": "Hedgehog, untrained",
    "darkformer": "DARKFormer, untrained",
}

UPPER = (80, 95)
"""Accuracies that the second panel shows."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
      attention: Name of the function or of the estimator.
      features: M, or None.
      window: ``exact_window``, or None.
      draw: Number of the draw of random features.
      accuracy: Share of masked residues that the model predicts.
      perplexity: Of them.
    """

    attention: str
    features: int | None
    window: int | None
    draw: int
    accuracy: float
    perplexity: float


def _groups(rows: Sequence[Row]) -> dict[tuple[str, int | None], dict[int | None, list[Row]]]:
    """Draws by name and window, then by number of features."""
    found: dict[tuple[str, int | None], dict[int | None, list[Row]]] = {}
    for row in rows:
        group = found.setdefault((row.attention, row.window), {})
        group.setdefault(row.features, []).append(row)
    return found


def _accuracy(draws: Sequence[Row]) -> float:
    return 100 * float(np.mean([row.accuracy for row in draws]))


def _cell(draws: Sequence[Row]) -> str:
    """Means over draws; with several, the deviation of the accuracy."""
    perplexity = float(np.mean([row.perplexity for row in draws]))
    deviation = 100 * float(np.std([row.accuracy for row in draws]))
    between = f" ± {deviation:.1f}" if len(draws) > 1 else ""
    return f"{_accuracy(draws):.1f}{between} ({perplexity:.{3 if perplexity < 2 else 2}f})"


def make_table(rows: Sequence[Row]) -> str:
    """Accuracies in percent with perplexities in brackets, a column a number of features."""
    numbers = sorted({row.features for row in rows if row.features is not None})
    lines = [
        "| attention | exact window | " + " | ".join(f"{n} features" for n in numbers) + " |",
        "| --- | ---: |" + " ---: |" * len(numbers),
    ]
    for (name, window), group in _groups(rows).items():
        if None in group:
            cells = [_cell(group[None]), *[""] * (len(numbers) - 1)]
        else:
            cells = [_cell(group[n]) if n in group else "" for n in numbers]
        label = LABELS.get(name, name)
        lines.append(f"| {label} | {window or ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_picture(rows: Sequence[Row], path: Path, model: str) -> None:
    """Draws accuracy over the number of features; dashed lines have an exact window.

    Args:
      rows: Measurements.
      path: Of the picture.
      model: Its name, for the title.

    Raises:
      SystemExit: Without matplotlib.
    """
    figure_class = load_figure_class("run the same command again; nothing is measured twice.")
    figure = figure_class(figsize=(11, 5), layout="constrained")
    whole, upper = figure.subplots(1, 2)
    for axes in (whole, upper):
        _draw_lines(axes, rows)
        axes.set_xlabel("number of features", fontsize=12)
        axes.grid(alpha=0.3)
    whole.set(ylim=(0, 100))
    whole.set_ylabel("masked residues predicted, %", fontsize=12)
    upper.set(ylim=UPPER, title="the same, upper end")
    whole.set_title(f"{model}, nothing trained")
    windows = sorted({row.window for row in rows if row.window is not None and row.features})
    if windows:
        label = f"dashed: with an exact\nwindow of {', '.join(map(str, windows))}"
        whole.plot([], [], color=GREY, linestyle="--", label=label)
    handles = whole.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_lines(axes: Any, rows: Sequence[Row]) -> None:
    """Draws a line a function, horizontal for those without features."""
    numbers = sorted({row.features for row in rows if row.features is not None})
    estimators = list(dict.fromkeys(row.attention for row in rows if row.features is not None))
    for (name, window), group in _groups(rows).items():
        label = LABELS.get(name, name)
        if None in group:
            black = name == "exact"
            label += f" ({window})" if window else ""
            style = {"color": "#000000" if black else GREY, "label": label, "linewidth": 1.6}
            line = "-" if black else "--" if window else ":"
            axes.axhline(_accuracy(group[None]), linestyle=line, **style)
            continue
        place = estimators.index(name)
        # Larger and hollow, so that what it equals untrained is seen inside.
        around = (
            {"markersize": 10, "fillstyle": "none", "zorder": 1.5} if name == "darkformer" else {}
        )
        points = [(number, _accuracy(group[number])) for number in numbers if number in group]
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[place],
            marker=MARKERS[place],
            linestyle="-" if window is None else "--",
            linewidth=1.8 if window is None else 1.3,
            label=label if window is None else None,
            **around,
        )
    axes.set_xscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers], minor=False)
    axes.set_xticks([], minor=True)
