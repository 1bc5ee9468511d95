"""``protein-lm fine-tune``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from fast_attention.protein_lm import pretrained, ranges
from fast_attention.protein_lm.cli import arguments
from fast_attention.protein_lm.errors import UsageError

SUMMARY = "fine-tune a trained model on a property of proteins, or on a family"
DESCRIPTION = """\
Fine-tune a trained model on a property of proteins from a table of examples, such as stability (a
number) or location (a class):

  protein-lm fine-tune --run_dir=runs/demo --table=stability.csv --task=regression \\
      --output=runs/stability

A part of the proteins is held out, and the report says how well their property is predicted.
'protein-lm predict' then predicts it for other proteins. Without --table, the model is trained
further on the proteins of --fasta, such as one family, and the result is a run like any other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where the result is written"
    )
    _add_property(parser)
    _add_training(parser)
    arguments.add_on_error_choice(parser, "raise")
    arguments.add_seed(parser, "random seed; equal seeds give equal results (default: 0)")


def _add_property(parser: argparse.ArgumentParser) -> None:
    """Adds what only fine-tuning with ``--table`` has."""
    table = parser.add_argument_group("a property")
    number = functools.partial(arguments.add_number, table)
    table.add_argument(
        "--table",
        metavar="FILE",
        help="examples: CSV or TSV, plain or gzip; the first line has the names of the columns",
    )
    table.add_argument(
        "--task",
        choices=("regression", "classification"),
        help="whether the label is a number or a class",
    )
    table.add_argument(
        "--method",
        choices=("frozen", "lora", "full"),
        help="frozen: a linear model on the vectors of 'protein-lm embed', seconds to minutes "
        "(default); lora: also low-rank adapters of every layer; full: also all parameters",
    )
    for name, default, meaning in (
        ("sequence", "sequence", "the residues"),
        ("label", "label", "the property"),
        ("id", "id", "names, needed with --fasta"),
    ):
        table.add_argument(
            f"--{name}_column",
            metavar="NAME",
            help=f"the column of {meaning} (default: {default})",
        )
    table.add_argument(
        "--split_column",
        metavar="NAME",
        help="the column with train, valid or test (default: 'split', if there is one)",
    )
    table.add_argument(
        "--group_column",
        metavar="NAME",
        help="a column of families; the proteins of one family are then all in the same part",
    )
    number(
        "--test_share",
        ranges.SHARE,
        "X",
        "the share of the proteins held out for the report, if there is no split column "
        "(default: 0.2)",
    )
    number(
        "--valid_share",
        ranges.SHARE,
        "X",
        "the share of the other proteins used to decide when to stop (default: 0.1)",
    )
    table.add_argument(
        "--balanced",
        action="store_true",
        default=None,
        help="give all classes the same weight, whatever their number of proteins",
    )
    number("--rank", ranges.RANK, "R", "rank of the lora adapters (default: 8)")
    number(
        "--patience",
        ranges.EPOCHS,
        "N",
        "epochs without improvement after which to stop (default: 3)",
    )
    number("--max_length", ranges.LENGTH, "N", "use the first N residues of longer proteins")
    table.add_argument(
        "--whole_model",
        action="store_true",
        default=None,
        help="store the whole model, so that the result does not need --run_dir any more "
        "(always for the model that comes with the package)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Adds what fine-tuning has with and without ``--table``."""
    both = parser.add_argument_group("training")
    number = functools.partial(arguments.add_number, both)
    both.add_argument(
        "--fasta",
        action="append",
        metavar="PATH",
        help="with --table: the sequences of the proteins, found by id; without --table: the "
        "proteins to train on; a FASTA file or a folder of them; may be repeated",
    )
    both.add_argument(
        "--valid_fasta",
        action="append",
        metavar="PATH",
        help="without --table: proteins to validate and to evaluate on; may be repeated",
    )
    number(
        "--epochs",
        ranges.EPOCHS,
        "N",
        "passes through the proteins (default: 20 with --table, else 10)",
    )
    number(
        "--batch_size",
        ranges.BATCH_SIZE,
        "N",
        "proteins per batch (default: 16 with --table, else that of the run)",
    )
    number(
        "--learning_rate",
        ranges.LEARNING_RATE,
        "X",
        "peak learning rate (default: 1e-3 for lora, else 1e-4)",
    )


_COLUMNS = ("sequence_column", "label_column", "id_column", "split_column", "group_column")
_PROPERTY = ("method", "rank", "patience", "balanced", "test_share", "valid_share", "max_length")
_STEPS = ("rank", "patience", "epochs", "batch_size", "learning_rate")
"""What only gradient steps need, and not the exact solution of a frozen trunk."""


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.finetune import tuning_run
    from fast_attention.protein_lm.training import continued_run

    training = _given(options, ("batch_size", "learning_rate"))
    if options.table is None:
        if not options.fasta:
            raise UsageError("give --table (a property to learn) or --fasta (proteins to train on)")
        if options.task is not None:
            raise UsageError(f"--task={options.task} needs --table, the proteins with their labels")
        _refuse(options, (*_COLUMNS, *_PROPERTY, "whole_model"), "needs --table")
        continued_run.continue_training(
            options.run_dir,
            options.output,
            options.fasta,
            valid_fasta=options.valid_fasta,
            epochs=10 if options.epochs is None else options.epochs,
            seed=options.seed,
            on_error=options.on_error,
            gin_file=options.gin_file,
            **training,
        )
        return
    if options.task is None:
        raise UsageError("say --task=regression (a number) or --task=classification (a class)")
    if options.valid_fasta:
        raise UsageError("--valid_fasta is without --table; name a --split_column instead")
    if options.method in (None, "frozen"):
        _refuse(options, _STEPS, "needs --method=lora or full")
    if options.method == "full":
        _refuse(options, ("rank",), "needs --method=lora")
    if options.task == "regression":
        _refuse(options, ("balanced",), "needs --task=classification")
    if options.epochs is not None:
        training["max_epochs"] = options.epochs
    tuning_run.run_tuning(
        options.run_dir,
        options.output,
        options.table,
        task=options.task,
        fasta=options.fasta,
        columns=_given(options, _COLUMNS) | {"on_error": options.on_error},
        # Where the package is depends on the installation.
        whole_model=bool(options.whole_model) or pretrained.is_pretrained(options.run_dir),
        gin_file=options.gin_file,
        options=_given(options, _PROPERTY) | training | {"seed": options.seed},
    )


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in _given(options, names):
        raise UsageError(f"--{name} {why}: leave it out")
