"""``protein-lm info``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fast_attention.protein_lm.cli import arguments

SUMMARY = "describe a trained model, its training and its evaluations"
DESCRIPTION = """\
Describe a trained model: architecture and size, training proteins, training progress, the latest
metrics and evaluations. It also works for a run that is still being trained, for an exported model,
and for a predictor (the result of 'protein-lm fine-tune --table').

  protein-lm info --run_dir=runs/demo"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    parser.add_argument("--json", action="store_true", help="print the description as JSON")
    parser.add_argument(
        "--skip_corpus",
        action="store_true",
        help="omit the FASTA files that the model was trained on",
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.evaluation.run_description import (
        describe_run,
        format_information,
    )
    from fast_attention.protein_lm.files.output_files import json_text, printable
    from fast_attention.protein_lm.finetune.predictor_information import (
        describe_predictor,
        format_predictor,
    )
    from fast_attention.protein_lm.runs.run_folder import RunFolder, content

    folder = RunFolder(Path(options.run_dir))
    predictor = content(folder) == "a predictor"
    if predictor:
        about = describe_predictor(folder.path)
    else:
        about = describe_run(
            folder.path, with_corpus=not options.skip_corpus, gin_file=options.gin_file
        )
    if options.json:
        print(json_text(about, indent=1))
        return
    text = format_predictor(about) if predictor else format_information(about)
    for line in text.split("\n"):
        # A control character out of a file would be a command to the terminal.
        print(printable(line))
