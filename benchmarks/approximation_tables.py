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


def features_for(target: float, features: Sequence[int], errors: Sequence[float]) -> str:
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


def target_table(numbers: Numbers, functions: Sequence[str]) -> str:
    """Features that bring the error over all heads to a target."""
    lines = [
        "| data | uniform weights | estimator | "
        + " | ".join(f"error {target:g}" for target in TARGETS)
        + " |",
        "|---|---|---|" + "---|" * len(TARGETS),
    ]
    for name, panel in _panels(numbers):
        for function in functions:
            errors = panel["errors"].get(function)
            if errors is None:
                continue
            cells = [features_for(target, panel["features"], errors) for target in TARGETS]
            lines.append(
                f"| {name} | {panel['uniform']:.2f} | {function} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)


def error_table(numbers: Numbers, picture: str) -> str:
    """Errors of every function of a picture at every M."""
    lines = []
    for name, panel in numbers[picture].items():
        lines += [
            f"| {name} | " + " | ".join(f"M = {m}" for m in panel["features"]) + " |",
            "|---|" + "---|" * len(panel["features"]),
            f"| uniform weights | {panel['uniform']:.3g} |" + " |" * (len(panel["features"]) - 1),
        ]
        for function, errors in panel["errors"].items():
            lines.append(f"| {function} | " + " | ".join(f"{x:.3g}" for x in errors) + " |")
        lines.append("")
    return "\n".join(lines[:-1])


def head_table(numbers: Numbers, function: str, pictures: Sequence[str]) -> str:
    """Errors head by head, the sharpest first: effective keys, uniform weights, and every M."""
    features = numbers[pictures[0]][pictures[0]]["features"]
    lines = [
        "| head | effective keys | uniform weights | "
        + " | ".join(f"M = {m}" for m in features)
        + " |",
        "|---|---|---|" + "---|" * len(features),
    ]
    for picture in pictures:
        panel = numbers[picture][picture]
        for head in np.argsort(panel["effective keys"]):
            errors = panel["by head"][function][head]
            lines.append(
                f"| {picture} {head} | {panel['effective keys'][head]:.0f} | "
                f"{panel['uniform by head'][head]:.2f} | "
                + " | ".join(f"{x:.2f}" for x in errors)
                + " |"
            )
    return "\n".join(lines)


def tables(numbers: Numbers) -> str:
    """All tables, in the order of the guide."""
    functions = ("favor+", "wderf_s, antithetic", "wderf_s, window 32")
    heads = [name for name in ("minilm", "rxnfp") if name in numbers]
    measured = {name: panels for name, panels in numbers.items() if name != "paper"}
    parts = [target_table(measured, functions)]
    if heads:
        parts.append(head_table(numbers, functions[1], heads))
    if "paper" in numbers:
        parts.append(error_table(numbers, "paper"))
    return "\n\n".join(parts)


def _panels(numbers: Numbers) -> list[tuple[str, Mapping[str, Any]]]:
    return [pair for panels in numbers.values() for pair in panels.items()]
