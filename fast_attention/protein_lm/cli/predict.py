"""``protein-lm predict``."""

from __future__ import annotations

import argparse

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.cli import arguments

SUMMARY = "predict a property with a fine-tuned model"
DESCRIPTION = """\
Predict a property of proteins with the result of 'protein-lm fine-tune --table=...', and write a
table with a row per protein. Proteins are cropped as in 'fine-tune --max_length'. Without that
option, a protein of more than 50,000 residues is an error. With --output=FILE, the same command
resumes an interrupted one.

  protein-lm predict --model=runs/stability --fasta=new.fasta --output=predictions.tsv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="the --output of 'protein-lm fine-tune'"
    )
    parser.add_argument(
        "--run_dir",
        metavar="FOLDER",
        help="the run that was fine-tuned (default: its relative path as stored in --model)",
    )
    arguments.add_gin_file(parser)
    arguments.add_fasta(parser, "proteins to predict")
    arguments.add_table(parser)
    arguments.add_on_error(parser)


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.files.output_targets import status_stream
    from fast_attention.protein_lm.files.tables import EXTENSIONS, find_extension
    from fast_attention.protein_lm.finetune.finetuned import FineTuned
    from fast_attention.protein_lm.finetune.prediction_files import CROP, predict_to_file
    from fast_attention.protein_lm.inference.model_inputs import read_for_model
    from fast_attention.protein_lm.wording import counted, place

    find_extension(options.output, EXTENSIONS)
    arguments.check_files(options, "output", "skipped_list")
    tuned = FineTuned.load(options.model, run_dir=options.run_dir, gin_file=options.gin_file)
    with arguments.skipped_records(options) as skipped:
        records = read_for_model(
            tuned.model,
            options.fasta,
            max_length=tuned.max_length,
            on_error=options.on_error,
            skipped=skipped,
            crop=CROP,
        )
        done = predict_to_file(tuned, records, options.output)
        status = status_stream(options.output, options.skipped_list)
        messages.note(
            f"predictions of {counted(done.proteins, 'protein')} written to "
            f"{place(options.output)}",
            status,
        )
        if done.resumed:
            before = counted(done.resumed, "protein")
            messages.note(f"{before} of these had been predicted before the interruption", status)
