"""Time and memory against length, both axes logarithmic, as in figure 3 of arXiv:2009.14794."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.programs import BACKWARD, FORWARD
from benchmarks.results import CaseInfo, Results, Row
from benchmarks.settings import Setting

# Okabe and Ito's colours, told apart with any colour vision; the markers do without any.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#777777"


def picture_names(results: Results) -> dict[str, str]:
    """Returns the pictures of a run: file names and what they show."""
    names = {}
    for shape in results.shapes():
        start = f"{results.machine['platform']}-d{shape.head_dim}"
        for kind in results.kinds():
            names[f"{start}-time-{kind}.png"] = f"time of {kind} attention, D={shape.head_dim}"
        names[f"{start}-memory.png"] = f"memory of forward and gradients, D={shape.head_dim}"
    return names


def load_figure_class(remedy: str) -> Any:
    """Imports matplotlib's class of pictures.

    Args:
      remedy: What to do after an installation, for the message.

    Raises:
      SystemExit: without matplotlib.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise SystemExit(
            f'The pictures need matplotlib: pip install -e ".[benchmarks]", then {remedy}'
        ) from None


def draw(results: Results, folder: Path) -> None:
    """Writes all pictures of a run into ``folder``.

    Raises:
      SystemExit: without matplotlib.
    """
    figure_class = load_figure_class("run `python -m benchmarks.report` on the folder of this run.")
    folder.mkdir(parents=True, exist_ok=True)
    for shape in results.shapes():
        start = f"{results.machine['platform']}-d{shape.head_dim}"
        for kind in results.kinds():
            panels = [(f"{kind}, {m}", kind, m) for m in (FORWARD, BACKWARD)]
            figure = _figure(
                figure_class, results, shape, panels, "seconds", lambda row: row.seconds
            )
            figure.savefig(folder / f"{start}-time-{kind}.png", dpi=130)
        panels = [(f"{kind}, f+b", kind, BACKWARD) for kind in results.kinds()]
        figure = _figure(figure_class, results, shape, panels, "MiB", _mebibytes)
        figure.savefig(folder / f"{start}-memory.png", dpi=130)


def _mebibytes(row: Row) -> float | None:
    return None if row.memory is None else row.memory / 2**20


def _figure(
    figure_class: Any,
    results: Results,
    shape: Setting,
    panels: list[tuple[str, str, str]],
    unit: str,
    value: Callable[[Row], float | None],
) -> Any:
    figure = figure_class(figsize=(12, 4.8), layout="constrained")
    handles = {}
    for axes, (title, kind, measure) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for info in results.cases:
            points = [
                (row.setting.length, value(row))
                for row in results.of(measure, shape)
                if row.case == info.name and info.attention in (kind, None)
            ]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), **_style(results, info))
                handles.setdefault(info.label, line)
        lengths = results.lengths(measure, shape)
        axes.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks(lengths, [_short(length) for length in lengths], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.tick_params(labelleft=True)
        axes.set_ylabel(unit)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    return figure


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _style(results: Results, info: CaseInfo) -> dict[str, Any]:
    """Returns colour, marker and line: the same for one mechanism in every picture of a run."""
    if info.attention is None:
        line = ":" if info.name == "identity" else "-."
        return {"color": GREY, "linestyle": line, "marker": "", "linewidth": 2}
    drawn = {row.case for row in results.rows if row.samples or row.memory is not None}
    mechanisms = dict.fromkeys(
        other.name.partition("/")[2]
        for other in results.cases
        if other.attention is not None and other.name in drawn
    )
    place = list(mechanisms).index(info.name.partition("/")[2])
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 5,
        "linestyle": "-" if info.ours else "--",
        "linewidth": 2.2 if info.ours else 1.3,
    }
