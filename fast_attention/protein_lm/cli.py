"""The console command ``protein-lm``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from fast_attention.protein_lm.huge_pages import restart_with_huge_pages
from fast_attention.protein_lm.run_folder import RunError, write_file

_DESCRIPTION = """\
Train protein language models on FASTA files, and use them.

  protein-lm train --gin_file=protein_lm_configs/demo.gin --work_dir=runs/demo
  protein-lm evaluate --run_dir=runs/demo --fasta=my_proteins.fasta
  protein-lm sample --run_dir=runs/demo --num_samples=10 --output=new_proteins.fasta

Every command explains itself: protein-lm train --help."""

_TRAIN = """\
Train a model and write it to a folder. A run that was stopped goes on from its last checkpoint
when the same command is given again. Without --fasta, the proteins that come with the package are
used."""

_EVALUATE = """\
Say how well a trained model predicts the residues of some proteins, beside simple baselines.
Perplexity is the number of residues that the model in effect wavers between (less is better, 20 is
a blind guess); accuracy is how often its first choice is the right residue."""

_SAMPLE = """\
Write new proteins, drawn from a trained model, to a FASTA file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: What follows the command's name; None takes them from the command line.

    Returns:
      The exit status: 0 for success, 1 for a failure whose reason is on stderr, 2 (by way of
      SystemExit) for arguments that cannot be understood, 130 when stopped from the keyboard.
    """
    options = _parser().parse_args(arguments)
    if arguments is None and options.command == "train":
        restart_with_huge_pages()
    try:
        options.run(options)
    except KeyboardInterrupt:
        remedy = ", and the same command goes on" if options.command == "train" else ""
        print(f"\nprotein-lm {options.command}: stopped{remedy}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; writing there again at exit would fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunError, FloatingPointError, OSError, SyntaxError, TypeError, ValueError) as error:
        if options.traceback:
            traceback.print_exc()
        print(f"protein-lm {options.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "protein-lm",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = _command(commands, "train", "train a model, or resume its training", _TRAIN)
    train.set_defaults(run=_train)
    train.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="the settings, a gin file such as protein_lm_configs/demo.gin; may be repeated",
    )
    train.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="SETTING",
        help="one more setting, such as 'FlaxModel.num_layers = 4'; may be repeated, and wins "
        "over the files",
    )
    train.add_argument(
        "--work_dir", required=True, metavar="FOLDER", help="where the run is written; one run each"
    )
    for flag, meaning in (
        ("--fasta", "proteins to train on, FASTA, plain or gzip; may be repeated"),
        ("--valid_fasta", "proteins to validate on during training; may be repeated"),
        ("--test_fasta", "proteins to evaluate on at the end; may be repeated"),
    ):
        train.add_argument(flag, action="append", metavar="FILE", help=meaning)

    evaluate = _command(commands, "evaluate", "score a trained model on proteins", _EVALUATE)
    evaluate.set_defaults(run=_evaluate)
    _add_run_dir(evaluate)
    evaluate.add_argument(
        "--fasta",
        action="append",
        required=True,
        metavar="FILE",
        help="proteins to predict, FASTA, plain or gzip; may be repeated",
    )
    evaluate.add_argument(
        "--output",
        metavar="FILE",
        help="where to write the figures as JSON (default: evaluation.json in the run's folder)",
    )
    evaluate.add_argument(
        "--batch_size", type=int, metavar="N", help="proteins at a time; less needs less memory"
    )
    evaluate.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which residues FlaxBERT is asked for"
    )

    sample = _command(commands, "sample", "write new proteins", _SAMPLE)
    sample.set_defaults(run=_sample)
    _add_run_dir(sample)
    sample.add_argument(
        "--num_samples", type=int, default=10, metavar="N", help="how many proteins (default: 10)"
    )
    sample.add_argument(
        "--prompt",
        default="",
        metavar="RESIDUES",
        help="residues that every protein begins with, such as MKT",
    )
    sample.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="below 1 more typical proteins, above 1 more unusual ones, 0 always the most probable "
        "residue (default: 1)",
    )
    sample.add_argument(
        "--top_k", type=int, metavar="K", help="draw among the K most probable residues only"
    )
    sample.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="draw among the fewest residues that together have probability P",
    )
    sample.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="most residues of a protein, the prompt included (default: the model's limit)",
    )
    sample.add_argument(
        "--seed", type=int, default=0, metavar="N", help="equal seeds give equal proteins"
    )
    sample.add_argument(
        "--output", required=True, metavar="FILE", help="the FASTA file; .gz compresses it"
    )
    return parser


def _command(commands, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="on failure, show where in the program it was"
    )
    return parser


def _add_run_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run_dir", required=True, metavar="FOLDER", help="the --work_dir of a trained run"
    )


# JAX takes a second to import, which --help and a mistyped flag should not have to wait for.


def _train(options: argparse.Namespace) -> None:
    import gin

    from fast_attention.protein_lm import gin_registry

    files = {
        "train_files": options.fasta,
        "valid_files": options.valid_fasta,
        "test_files": options.test_fasta,
    }
    bindings = [f"experiment.{name} = {paths!r}" for name, paths in files.items() if paths]
    gin_registry.configure(options.gin_file, options.gin_bindings + bindings)
    gin.get_configurable("experiment")(options.work_dir)


def _evaluate(options: argparse.Namespace) -> None:
    from fast_attention.protein_lm import evaluation, report
    from fast_attention.protein_lm.loading import load_run

    model, step, folder = load_run(options.run_dir)
    result = evaluation.evaluate_on(
        model,
        options.fasta,
        evaluation.load_baselines(folder.baselines),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    result = {"run_dir": str(folder.path), "step": step} | result
    output = Path(options.output or folder.path / "evaluation.json")
    write_file(output, json.dumps(result, indent=1) + "\n")
    print(f"{report.format_evaluation(result)}\n\nwritten to {output}")


def _sample(options: argparse.Namespace) -> None:
    from fast_attention.protein_lm.fasta import write_fasta
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.sampling import sample_proteins

    records = sample_proteins(
        load_run(options.run_dir).model,
        options.num_samples,
        prompt=options.prompt,
        seed=options.seed,
        max_length=options.max_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    write_fasta(options.output, records)
    print(f"{len(records)} proteins written to {options.output}")
