"""``protein-lm evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fast_attention.protein_lm.commands import arguments

SUMMARY = "say how well a trained model predicts proteins"
DESCRIPTION = """\
Say how well a trained model predicts the residues of some proteins, beside simple baselines.
Perplexity is the number of residues that the model in effect wavers between (less is better, 20 is
a blind guess); accuracy is how often its first choice is the right residue."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    arguments.add_fasta(parser, "proteins to predict")
    arguments.add_on_error(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where to write the figures as JSON (default: evaluation.json in the run's folder)",
    )
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="proteins at a time; less needs less memory"
    )
    arguments.add_seed(parser, "which residues FlaxBERT is asked for")


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm import evaluation, report
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.output_files import check_output
    from fast_attention.protein_lm.run_folder import write_file

    model, step, folder = load_run(options.run_dir)
    output = Path(options.output or folder.evaluation)
    check_output(output)
    with arguments.skipped_records(options) as skipped:
        result = evaluation.evaluate_on(
            model,
            options.fasta,
            evaluation.load_baselines(folder.baselines),
            batch_size=options.batch_size,
            seed=options.seed,
            on_error=options.on_error,
            skipped=skipped,
        )
        result = {"run_dir": str(folder.path), "step": step} | result
        write_file(output, json.dumps(result, indent=1) + "\n")
        print(f"{report.format_evaluation(result)}\n\nwritten to {output}")
