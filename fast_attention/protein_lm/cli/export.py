"""``protein-lm export``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.cli import arguments
from fast_attention.protein_lm.errors import UsageError

SUMMARY = "write a trained model as safetensors and JSON"
DESCRIPTION = """\
Export a trained protein model to a new folder, for other programs or other people:
model.safetensors has the parameters, model.json the configuration. The folder is much smaller
than the run, and is accepted as --run_dir by every command; training cannot be resumed from it.

  protein-lm export --run_dir=runs/demo --output=demo_model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the new folder")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="store float32 parameters rounded to 16 bits, in half the space (default: as they "
        "are)",
    )
    parser.add_argument(
        "--average_with",
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="store the average of the parameters of --run_dir and of this run or exported model, "
        "of the same configuration; repeat it for more, each with the same weight",
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.evaluation import run_description
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.runs.averaging import set_average
    from fast_attention.protein_lm.runs.exporting import check_export, export_model
    from fast_attention.protein_lm.runs.run_folder import RunFolder
    from fast_attention.protein_lm.wording import counted, place

    sources = [options.run_dir, *options.average_with]
    for source in sources:
        check_export(RunFolder(Path(source)), RunFolder(Path(options.output)))
    _check_different(sources)
    model, step, folder = load_run(options.run_dir, gin_file=options.gin_file)
    if options.average_with:
        others = {
            other: load_run(other, gin_file=options.gin_file).model
            for other in options.average_with
        }
        set_average(model, others)
    tokens = run_description.tokens_seen(folder, step)
    target = export_model(
        model, folder, options.output, step=step, tokens=tokens, dtype=options.dtype
    )
    messages.note(
        f"{type(model).__name__} with {counted(model.num_parameters, 'parameter')} after "
        f"{counted(step, 'step')} written to {place(target.path)}",
        sys.stdout,
    )


def _check_different(sources: Sequence[str]) -> None:
    """Raises UsageError if a model is to be averaged with itself."""
    known: dict[str, str] = {}
    for source in sources:
        place = os.path.realpath(source)
        if place in known:
            raise UsageError(
                f"--average_with={source} is given already (as {known[place]}), and each model "
                "counts once in an average: leave it out, or name another model"
            )
        known[place] = source
