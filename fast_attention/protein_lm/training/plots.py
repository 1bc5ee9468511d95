"""The learning curve as a picture."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fast_attention.diagnostics.plots import log_ticks
from fast_attention.protein_lm.files.output_files import printable, write_file


def plot_learning_curve(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    references: Mapping[str, float] | None = None,
) -> None:
    """Draws perplexity against training steps.

    Args:
      path: The picture, PNG.
      rows: Rows of ``metrics.jsonl``; those without ``perplexity`` are left out.
      references: Perplexities to draw as level lines, by name.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in rows if row.get("perplexity") is not None]
    for split in dict.fromkeys(row["split"] for row in rows):
        points = [(row["step"], row["perplexity"]) for row in rows if row["split"] == split]
        axes.plot(*zip(*points, strict=True), label=split, marker="o", markersize=2)
    for (name, value), style in zip((references or {}).items(), ("--", "-.", ":"), strict=False):
        axes.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} {value:.2f}")
    axes.set_xlabel("training step")
    axes.set_ylabel("perplexity per token (log scale)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    log_ticks(axes.yaxis)
    name = printable(path.absolute().parent.name).replace("$", r"\$")
    axes.set_title(f"learning curve of the run {name}", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # The font lacks letters of some names, for which there are boxes then.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())
