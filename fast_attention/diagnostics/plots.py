"""Plots of attention matrices and errors."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_attention.diagnostics.curves import ErrorCurves
from fast_attention.diagnostics.errors import Recommendation

# Okabe and Ito's colours, distinct with any colour vision; markers are distinct without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
LABEL_INCHES = 0.13
"""From one name beside a line to the next."""
NOTE_WIDTH = 60
"""Characters of a line in a picture."""


def plot_matrices(matrices: Mapping[str, Any], path: str | Path) -> None:
    """Plots attention matrices side by side, with one colour scale.

    Colours show the square root of weights (or weights, if some are negative); the largest 0.1 %
    share one colour.

    Args:
      matrices: ``[R, S]`` by name, such as one head of ``attention_matrix``.
      path: Output file; the suffix selects the format.

    Raises:
      ImportError: Without matplotlib.
      ValueError: If there is nothing to draw, or a matrix has more axes.
    """
    squares = {name: np.asarray(matrix, np.float64) for name, matrix in matrices.items()}
    if not squares or any(square.ndim != 2 for square in squares.values()):
        shapes = {name: square.shape for name, square in squares.items()}
        raise ValueError(f"Expected one or more matrices [rows, keys], got {shapes}.")
    figure = make_figure(2.7 * len(squares) + 0.6, 3.0)
    everything = np.concatenate([square.ravel() for square in squares.values()])
    low, high = min(0.0, float(everything.min())), float(np.quantile(everything, 0.999))
    # Weights differ by orders of magnitude: their roots can be seen side by side.
    signed = {"vmin": low, "vmax": high}
    scale = signed if low < 0 else {"norm": _root_scale(max(high, 1e-30))}
    panels = figure.subplots(1, len(squares), sharex=True, sharey=True, squeeze=False)[0]
    image = None
    for axes, (name, square) in zip(panels, squares.items(), strict=True):
        image = axes.imshow(square, cmap="viridis", aspect="auto", **scale)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("key", fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("query", fontsize=8)
    bar = figure.colorbar(image, ax=list(panels), extend="max", pad=0.01)
    bar.set_label("weight", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def plot_recommendation(recommendation: Recommendation, path: str | Path) -> None:
    """Plots the error as a function of the number of features; extrapolation is dashed.

    Args:
      recommendation: Result of ``recommend_features``.
      path: Output file; the suffix selects the format.

    Raises:
      ImportError: Without matplotlib.
    """
    figure = make_figure(4.5, 3.2)
    axes = figure.add_subplot()
    axes.loglog(*zip(*recommendation.measured, strict=True), marker="o", label="measured")
    if recommendation.extrapolated:
        ends = recommendation.measured[-1], (recommendation.features, recommendation.error)
        axes.loglog(*zip(*ends, strict=True), linestyle="--", marker="x", label="extrapolated")
    axes.set_xlabel("features M (log scale)")
    axes.set_ylabel("relative error of the attention matrix (log scale)", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend()
    figure.savefig(path, dpi=120)


def log_ticks(axis: Any) -> None:
    """Labels the ticks of a logarithmic axis with plain numbers, also within one decade.

    Args:
      axis: The ``xaxis`` or ``yaxis`` of a matplotlib ``Axes``.
    """
    from matplotlib.ticker import LogFormatter, LogLocator

    class Plain(LogFormatter):
        """The numbers that `LogFormatter` labels, without exponents."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator())
    axis.set_minor_locator(LogLocator(subs="auto"))
    axis.set_major_formatter("{x:g}")
    # Between powers of ten, where these are few.
    axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))


def plot_head_errors(
    ratios: Any, path: Any, matrices: Mapping[str, Any] | None = None, title: str = ""
) -> None:
    """Plots the error of every head of a model, divided by that of uniform attention.

    Args:
      ratios: ``[layers, heads]``: 0 is exact, 1 and above (red) is no better than uniform
        attention; NaN (grey) is a head that a layer does not have.
      path: Output file (the suffix selects the format), or a binary stream for PNG.
      matrices: ``[rows, keys]`` by name, also plotted, with one colour scale; such as the exact and
        the approximate matrix of one head.
      title: Title of the first panel.

    Raises:
      ImportError: Without matplotlib.
    """
    values = np.asarray(ratios, np.float64)
    squares = {name: np.asarray(matrix, np.float64) for name, matrix in (matrices or {}).items()}
    width = max(3.5, 1.5 + 0.5 * values.shape[1])
    figure = make_figure(
        width + 3.2 * len(squares) + (0.8 if squares else 0), max(3.2, 1.2 + 0.4 * values.shape[0])
    )
    grid = figure.subplots(
        1, 1 + len(squares), squeeze=False, width_ratios=[width, *(3.2 for _ in squares)]
    )[0]
    axes = grid[0]
    axes.set_facecolor("0.85")
    # White is at 1: red cells are worse than a constant.
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
        image = axes.imshow(square, cmap="viridis", vmin=0, vmax=high or 1, aspect="auto")
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("key (position)")
        axes.set_ylabel("query (position)")
        axes.tick_params(labelsize=6)
        for axis in ("x", "y"):
            axes.locator_params(axis=axis, integer=True)
    if squares:
        bar = figure.colorbar(image, ax=list(grid[1:]), extend="max", pad=0.01)
        bar.set_label("attention weight", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)


def plot_errors(
    curves: ErrorCurves | Mapping[str, ErrorCurves],
    path: str | Path,
    *,
    emphasis: Sequence[str] | None = None,
    largest: float = 2.0,
) -> None:
    """Plots the error as a function of the number of features, a line per function.

    A line is the median over draws of the root mean square over heads; its band ranges from the
    best to the worst draw. Lines completely above the plot are named at its upper edge.

    Args:
      curves: Result of ``error_curves``, or several by title, plotted side by side.
      path: Output file; the suffix selects the format.
      emphasis: Names of functions drawn in colour; others are thin and grey. None colours all.
      largest: Maximum upper end of the error axis; 1 is an error as large as the exact output.

    Raises:
      ImportError: Without matplotlib.
      ValueError: If there is nothing to draw, or a name in `emphasis` was not measured.
    """
    panels = {"": curves} if isinstance(curves, ErrorCurves) else dict(curves)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel.errors))
    strong = names if emphasis is None else list(emphasis)
    if not names or not set(strong) <= set(names):
        raise ValueError(f"Cannot emphasise {strong} in pictures of {names}.")
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(strong)
    }
    height = max(3.6, 0.16 * len(names) + 1.6)
    figure = make_figure(5.2 * len(panels), height)
    for number, (title, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        _label_ends(axes, _errors(axes, panel, styles, largest), height)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("features M (log scale)", fontsize=8)
        if number == 1:
            axes.set_ylabel("relative error of outputs (log scale)", fontsize=8)
    figure.savefig(path, dpi=110)


def make_figure(width: float, height: float) -> Any:
    """Returns an empty figure of this size in inches.

    Raises:
      ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install 'fast-attention[protein]', or matplotlib alone."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _errors(
    axes: Any, curves: ErrorCurves, styles: Mapping[str, Any], largest: float
) -> dict[str, tuple[float, str]]:
    """Draws one panel and returns where lines end, and their colours."""
    ends: dict[str, tuple[float, str]] = {}
    above, least, most = [], curves.uniform_over_heads(), curves.uniform_over_heads()
    for name in sorted(curves.errors, key=lambda name: name in styles):
        draws = np.nan_to_num(curves.over_heads(name), nan=np.inf, posinf=1e9)
        middle = np.median(draws, axis=1)
        if (middle > largest).all():
            ends_at = (float(f"{x:.2g}") for x in (middle.min(), middle.max()))
            above.append(f"{name} ({' to '.join(f'{x:g}' for x in ends_at)})")
            continue
        style = styles.get(name, {"color": GREY, "marker": ""})
        wide = name in styles
        axes.plot(
            curves.features,
            middle,
            **style,
            linewidth=1.8 if wide else 0.9,
            markersize=4,
            clip_on=True,
        )
        low, high = draws.min(1), draws.max(1)
        if wide:
            axes.fill_between(
                curves.features, low, high, color=style["color"], alpha=0.15, linewidth=0
            )
        least = min(least, float(low.min()))
        most = max(most, float(high.max() if wide else middle.max()))
        ends[name] = (float(middle[-1]), style["color"])
    largest = min(largest, 1.2 * most)
    ends = {name: (min(end, largest), colour) for name, (end, colour) in ends.items()}
    uniform = curves.uniform_over_heads()
    axes.axhline(uniform, color="black", linestyle=":", linewidth=1.2)
    ends["uniform weights"] = (min(uniform, largest), "black")
    axes.set(xscale="log", yscale="log", ylim=(0.9 * least, largest))
    axes.set_xlim(curves.features[0], curves.features[-1] * 1.02)
    axes.set_xticks(curves.features, [str(m) for m in curves.features])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    # Within two decades there is room for 0.2 and 0.5, too.
    few = largest < 100 * least
    axes.set_yticks(_ticks(0.9 * least, largest, (1, 2, 5) if few else (1,)))
    axes.set_yticks([], minor=True)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if above:
        note = textwrap.fill("above the picture: " + ", ".join(above), NOTE_WIDTH)
        text = axes.text(0.02, 0.985, note, transform=axes.transAxes, va="top", fontsize=7)
        text.set(color=GREY, in_layout=False)
    return ends


def _ticks(low: float, high: float, steps: tuple[int, ...]) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    values = [step * 10.0**decade for decade in decades for step in steps]
    return [value for value in values if low <= value <= high]


def _label_ends(axes: Any, ends: Mapping[str, tuple[float, str]], height: float) -> None:
    """Writes names beside the ends of lines, apart where they would overlap.

    Args:
      axes: Where lines end at the right edge.
      ends: Their last values and colours by name.
      height: Of the picture in inches.
    """
    to_fraction = axes.transScale + axes.transLimits
    names = sorted(ends, key=lambda name: ends[name][0])
    heights = np.array([to_fraction.transform((1, ends[name][0]))[1] for name in names])
    places = _apart(heights, LABEL_INCHES / (0.8 * height))
    for name, start, place in zip(names, heights, places, strict=True):
        axes.annotate(
            name,
            (1, start),
            (1.09, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=ends[name][1],
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": ends[name][1],
                "linewidth": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def _apart(heights: np.ndarray, distance: float) -> np.ndarray:
    """Moves ascending heights as little as keeps them `distance` apart and, if it can be, in 0..1.

    Less ``distance`` times their number they have to ascend: neighbours that do not share their
    mean (isotonic regression).
    """
    from scipy.optimize import isotonic_regression

    steps = distance * np.arange(len(heights))
    flat = isotonic_regression(heights - steps).x
    return np.clip(flat, 0, max(1 - steps[-1], 0)) + steps


def _root_scale(largest: float) -> Any:
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=largest)
