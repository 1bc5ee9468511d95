"""What a user is told: tables, samples and where things lie, as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from fast_attention.protein_lm.run_folder import RunFolder


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


def format_evaluation(result: dict[str, Any]) -> str:
    """The table of `evaluation.evaluate_on`."""
    asked = "residues" if result["objective"] == "causal" else "hidden residues"
    caption = (
        f"{result['residues']:,} {asked} of {result['proteins']:,} proteins "
        f"({', '.join(result['fasta'])}; the first {result['max_residues']} of each)"
    )
    table = format_table(
        ("", "perplexity", "accuracy"),
        [
            (row["name"], f"{row['perplexity']:.2f}", f"{100 * row['accuracy']:.2f} %")
            for row in result["scores"]
        ],
    )
    return f"{caption}\n\n{textwrap.indent(table, '  ')}"


def format_report(result: dict[str, Any], folder: RunFolder) -> str:
    """What a finished run reached, as told at its end."""
    parts = [
        f"{result['model']} with {result['parameters']:,} parameters, trained for "
        f"{result['steps']:,} steps on {result['tokens']:,} tokens in "
        f"{result['seconds'] / 60:.1f} minutes"
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
