"""Reports for users: tables, samples and places of files, as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from fast_attention.protein_lm.modeling.objectives import OBJECTIVES
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.wording import counted, duration, source

_GROUPS_SHOWN = 20


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def shared_note(name: str, shared: int, total: int) -> str:
    """Says how many proteins of a part are trained on, too; empty if none is.

    Args:
      name: Of the part, such as ``"validation"``.
      shared: Its proteins with the sequence of one that is trained on.
      total: All of its proteins.
    """
    if not shared:
        return ""
    verb = "is" if shared == 1 else "are"
    return (
        f"{shared:,} of {counted(total, f'{name} protein')} {verb} identical to training proteins: "
        "results on them do not show how well new proteins are predicted"
    )


def format_evaluation(result: dict[str, Any]) -> str:
    """The tables of `evaluation.evaluate_on`."""
    asked = "hidden residue" if "corruption" in result else "residue"
    caption = (
        f"{counted(result['residues'], asked)} of {counted(result['proteins'], 'protein')} "
        f"({', '.join(map(source, result['fasta']))}; "
        f"at most the first {result['max_residues']:,} residues of each)"
    )
    over, groups = result["errors"]["over"], result["errors"]["groups"]
    parts = [caption, _scores(result["scores"])]
    if groups > 1:
        parts.append(f"+- is one standard error over {groups:,} {over}s")
    else:
        parts.append(f"there are no error bars: they need at least two {over}s")
    if "corruption" in result:
        parts.insert(1, _corruption(result))
    if len(result["by_length"]) > 1:
        parts.append(_groups("length", result["by_length"]))
    if "by_family" in result:
        parts.append(_groups("family", result["by_family"]) + "\n  (+- over the proteins of each)")
    return "\n\n".join(parts)


def _scores(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        (
            row["name"],
            _with_error(row["perplexity"], row["perplexity_error"]),
            _with_error(100 * row["accuracy"], row["accuracy_error"], 100) + " %",
        )
        for row in rows
    ]
    return textwrap.indent(format_table(("", "perplexity", "accuracy"), cells), "  ")


def _groups(name: str, groups: Sequence[dict[str, Any]]) -> str:
    best = min(groups[0]["scores"][1:], key=lambda row: row["perplexity"])["name"]
    header = (name, "proteins", "residues", "perplexity", "accuracy", f"{best} perplexity")
    cells = []
    for group in groups[:_GROUPS_SHOWN]:
        model = group["scores"][0]
        baseline = next(row for row in group["scores"] if row["name"] == best)
        cells.append(
            (
                group[name],
                f"{group['proteins']:,}",
                f"{group['residues']:,}",
                _with_error(model["perplexity"], model["perplexity_error"]),
                _with_error(100 * model["accuracy"], model["accuracy_error"], 100) + " %",
                f"{baseline['perplexity']:.2f}",
            )
        )
    table = format_table(header, cells)
    if len(groups) > _GROUPS_SHOWN:
        table += f"\n... and {len(groups) - _GROUPS_SHOWN:,} more, all in the JSON file"
    return textwrap.indent(table, "  ")


def _with_error(value: float, error: float | None, scale: float = 1.0) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} +- {scale * error:.2f}"


def _corruption(result: dict[str, Any]) -> str:
    seeds = f"seed {result['seed']}"
    if result["num_seeds"] > 1:
        seeds = f"seeds {result['seed']} to {result['seed'] + result['num_seeds'] - 1}"
    return OBJECTIVES[result["objective"]](**result["corruption"]).describe(seeds)


def format_report(result: dict[str, Any], folder: RunFolder) -> str:
    """What a finished run reached, as printed at its end."""
    parts = [
        f"{result['model']} with {counted(result['parameters'], 'parameter')}, trained for "
        f"{counted(result['steps'], 'step')} on {counted(result['tokens'], 'token')} in "
        f"{duration(result['seconds'])}"
    ]
    if result["evaluation"] is not None:
        parts.append(format_evaluation(result["evaluation"]))
    if result["samples"]:
        samples = "\n".join(
            textwrap.fill(sequence or "(empty)", 80) + "\n" for sequence in result["samples"]
        )
        parts.append(f"sampled proteins\n\n{textwrap.indent(samples, '  ').rstrip()}")
    places = {
        "checkpoints": folder.checkpoints,
        "learning curve": folder.curve,
        "configuration": folder.config,
    }
    parts.append("\n".join(f"{name:<16}{path}" for name, path in places.items()))
    return "\n\n".join(parts)
