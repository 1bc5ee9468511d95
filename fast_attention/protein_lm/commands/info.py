"""``protein-lm info``."""

from __future__ import annotations

import argparse

from fast_attention.protein_lm.commands import arguments

SUMMARY = "say what a trained model is and what it reached"
DESCRIPTION = """\
Say what a trained model is and what it reached: its shape and size, the proteins it was trained on,
how far the training has come, its last figures. Works for a run that is still being trained, and
for an exported model.

  protein-lm info --run_dir=runs/demo"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument(
        "--skip_corpus",
        action="store_true",
        help="leave out the FASTA files that the model was trained on",
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.information import describe_run, format_information
    from fast_attention.protein_lm.output_files import json_text, printable

    about = describe_run(
        options.run_dir, with_corpus=not options.skip_corpus, gin_file=options.gin_file
    )
    if options.json:
        print(json_text(about, indent=1))
        return
    for line in format_information(about).split("\n"):
        # A control character out of a file would be a command to the terminal.
        print(printable(line))
