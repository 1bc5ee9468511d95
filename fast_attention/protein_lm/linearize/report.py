"""What `run_linearize` found, for people: a table and a picture."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from fast_attention.diagnostics.plots import make_figure
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation.report import format_table
from fast_attention.protein_lm.files.json_files import check_fields, read_json
from fast_attention.protein_lm.files.output_files import write_file

STAGES = {
    "exact": "exact attention",
    "before": "linear, not trained",
    "transfer": "after attention transfer",
    "finetune": "after fine-tuning",
    "window_off": "window off",
    "features_off": "features off",
}
"""Names of the parts of a report, in their order."""

_HINTS = {
    "asked": dict,
    "attention": dict,
    "exact_layers": list[int],
    "proteins": list[int],
    "found": dict,
}


def read_report(path: Path, num_layers: int) -> dict[str, Any]:
    """Reads what `run_linearize` wrote.

    Args:
      path: Of ``linearize.json``.
      num_layers: Of the model.

    Raises:
      RunError: If it is damaged.
    """
    report = check_fields(path, "", read_json(path), _HINTS)
    found = check_figures(path, report["found"], num_layers)
    for name in ("exact", "ranking"):
        if name not in found:
            raise RunError(f"{path}: found.{name} is missing; expected an object")
    return report | {"found": found}


def check_figures(path: Path, found: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Compares the figures in a file with what stages can have found.

    Args:
      path: The file, for errors.
      found: The figures by stage.
      num_layers: Of the model.

    Returns:
      The figures, with NaN for those that were not finite.

    Raises:
      RunError: At an unknown stage, or figures of another kind or number.
    """
    hints: dict[str, Any] = {name: {"perplexity": float | None} for name in STAGES}
    for name in ("ranking", "before", "transfer", "finetune"):
        hints[name] = hints.get(name, {}) | {"errors": list[float | None]}
    check_fields(path, "found", found, dict.fromkeys(hints, dict), optional=True)
    checked = {}
    for name, figures in found.items():
        figures = check_fields(path, f"found.{name}", figures, hints[name])
        if "errors" in figures and len(figures["errors"]) != num_layers:
            raise RunError(
                f"{path}: found.{name}.errors has {len(figures['errors'])} numbers; expected one "
                f"for each of the {num_layers} layers"
            )
        checked[name] = {
            key: [_number(x) for x in value] if isinstance(value, list) else _number(value)
            for key, value in figures.items()
        }
    return checked


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def format_report(report: dict[str, Any]) -> str:
    """Two tables: perplexity of each stage, and errors of layers."""
    found = report["found"]
    stages = [(name, title) for name, title in STAGES.items() if name in found]
    exact = found["exact"]["perplexity"]
    rows = [
        (title, f"{found[name]['perplexity']:.3f}", f"{found[name]['perplexity'] - exact:+.3f}")
        for name, title in stages
    ]
    parts = [format_table(("", "perplexity", "above exact"), rows)]
    columns = _with_errors(found)
    kept = set(report["exact_layers"])
    lines = [
        (
            f"{number}" + (" (exact)" if number in kept else ""),
            f"{error:.3f}",
            *(f"{found[name]['errors'][number - 1]:.3f}" for name in columns),
        )
        for number, error in enumerate(found["ranking"]["errors"], 1)
    ]
    header = ("layer", "if linear", *(STAGES[name] for name in columns))
    parts.append(format_table(header, lines))
    parts.append(
        "the error of a layer is that of its heads' outputs on the exact model's hidden states, "
        "relative to the exact output"
    )
    if "window_off" not in found:
        parts.append("there is no window: all is done by features")
    return "\n\n".join(parts)


def draw_errors(path: Path, report: dict[str, Any]) -> None:
    """Draws the error of each layer after each stage, as PNG.

    Raises:
      ImportError: Without matplotlib.
    """
    found = report["found"]
    layers = range(1, len(found["ranking"]["errors"]) + 1)
    figure = make_figure(max(4.0, 2.5 + 0.4 * len(layers)), 3.2)
    axes = figure.subplots()
    names = _with_errors(found)
    for name, colour in zip(names, ("0.6", "tab:blue", "tab:orange"), strict=False):
        errors = found[name]["errors"]
        label = f"{STAGES[name]}, perplexity {found[name]['perplexity']:.3f}"
        axes.plot(layers, errors, marker="o", markersize=4, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of attention outputs")
    axes.locator_params(axis="x", integer=True)
    axes.set_title(f"exact attention: perplexity {found['exact']['perplexity']:.3f}", fontsize=8)
    axes.legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_file(path, picture.getvalue())


def _with_errors(found: dict[str, Any]) -> list[str]:
    return [name for name in STAGES if found.get(name, {}).get("errors") is not None]
