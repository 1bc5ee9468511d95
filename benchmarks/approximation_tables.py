"""Tables of docs/choosing-features.md from the numbers of :mod:`.approximation_figure`.

Shape letters: M features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TARGETS = (0.5, 0.3, 0.2, 0.1, 0.05)
"""Relative errors of outputs asked for."""

Numbers = Mapping[str, Mapping[str, Any]]
"""By picture and panel, as ``approximation.json`` has them."""


def features_for(
    target: float, features: Sequence[int], errors: Sequence[float] | np.ndarray
) -> str:
    """Returns the least M whose error is at most a target, between measured ones in logarithms.

    Args:
      target: Error wanted.
      features: Measured numbers of features, ascending.
      errors: Their errors.

    Returns:
      A number of two digits, or that it lies below or above all measured ones.
    """
    if errors[0] <= target:
        return f"up to {features[0]}"
    for i, error in enumerate(errors[1:], 1):
        if error <= target:
            share = np.log(errors[i - 1] / target) / np.log(errors[i - 1] / error)
            exact = features[i - 1] * (features[i] / features[i - 1]) ** share
            size = 10 ** max(int(np.log10(exact)) - 1, 0)
            return str(int(np.ceil(exact / size) * size))
    return f"over {features[-1]}"


def overall(panel: Mapping[str, Any], function: str) -> np.ndarray:
    """Median over draws of the root mean square over heads, ``[P]``."""
    return np.median(_rms(np.asarray(panel["errors"][function])), axis=1)


def target_table(numbers: Numbers, functions: Sequence[str]) -> str:
    """Features that bring the error over all heads to a target."""
    lines = _head(
        "data", "uniform weights", "estimator", *(f"error {target:g}" for target in TARGETS)
    )
    for panels in numbers.values():
        for title, panel in panels.items():
            for function in functions:
                if function in panel["errors"]:
                    errors = overall(panel, function)
                    cells = [features_for(goal, panel["features"], errors) for goal in TARGETS]
                    uniform = f"{_rms(panel['uniform']):.2f}"
                    lines.append(_row(title, uniform, function, *cells))
    return "\n".join(lines)


def error_table(title: str, panel: Mapping[str, Any]) -> str:
    """Errors of every function at every M."""
    features = panel["features"]
    lines = _head(title, *(f"M = {m}" for m in features))
    lines.append(_row("uniform weights", *[f"{_rms(panel['uniform']):.3g}"] * len(features)))
    for function in panel["errors"]:
        lines.append(_row(function, *(f"{x:.3g}" for x in overall(panel, function))))
    return "\n".join(lines)


def head_table(panels: Mapping[str, Mapping[str, Any]], function: str) -> str:
    """Errors head by head, the sharpest first: effective keys, uniform weights, and every M."""
    features = next(iter(panels.values()))["features"]
    lines = _head("head", "effective keys", "uniform weights", *(f"M = {m}" for m in features))
    for title, panel in panels.items():
        errors = np.median(np.asarray(panel["errors"][function]), axis=1)
        keys = panel["effective keys"]
        for head in np.argsort(keys):
            start = f"{title} {head}", f"{keys[head]:.0f}", f"{panel['uniform'][head]:.2f}"
            lines.append(_row(*start, *(f"{x:.2f}" for x in errors[:, head])))
    return "\n".join(lines)


def tables(numbers: Numbers) -> str:
    """All tables, in the order of the guide."""
    best, near = "wderf_s, antithetic", "wderf_s, window 32"
    parts = [error_table(title, panel) for title, panel in numbers.get("paper", {}).items()]
    others = {name: panels for name, panels in numbers.items() if name != "paper"}
    parts.append(target_table(others, ("favor+", best, near)))
    heads = {name: numbers[name][name] for name in ("minilm", "rxnfp") if name in numbers}
    if heads:
        parts.append(head_table(heads, best))
    return "\n\n".join(parts)


def _rms(errors: Any) -> np.ndarray:
    return np.sqrt(np.mean(np.square(errors), axis=-1))


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
