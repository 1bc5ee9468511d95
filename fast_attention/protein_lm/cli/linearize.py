"""``protein-lm linearize``."""

from __future__ import annotations

import argparse
import dataclasses
import functools

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.cli import arguments

SUMMARY = "turn a trained model with exact attention into one with linear attention"
DESCRIPTION = """\
Turn a trained model with exact attention (a run, or an imported ESM-2 or BERT) into one with linear
attention, in three stages:

  1. The layers are ranked by their error. The N worst keep exact attention (--keep_exact=N).
  2. Attention transfer: the features of the other layers are trained to imitate the outputs of
     exact attention. No other parameter is trained.
  3. Fine-tuning: adapters or all parameters are trained with the loss of the model and with the
     predictions of the exact model as targets (--kl_weight).

The report has the perplexity after each stage. With --exact_window it also has the perplexity of
the features without the window, and of the window without the features.

  protein-lm linearize --run_dir=runs/exact --work_dir=runs/linear --fasta=proteins.fasta \\
      --estimator=hedgehog --exact_window=32

The new folder is an exported model: evaluate, score, embed, mutate, sample, fine-tune and export
take it. The same arguments resume an interrupted command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser, required=True)
    parser.add_argument("--work_dir", required=True, metavar="FOLDER", help="the new folder")
    parser.add_argument(
        "--fasta",
        action="append",
        required=True,
        metavar="PATH",
        help="proteins to train on, a FASTA file or a folder of them; may be repeated",
    )
    parser.add_argument(
        "--valid_fasta",
        action="append",
        metavar="PATH",
        help="proteins to measure on (default: every tenth protein of --fasta, which is then not "
        "trained on); may be repeated",
    )
    _add_attention(parser)
    _add_training(parser)
    arguments.add_on_error_choice(parser, "raise")
    arguments.add_seed(parser, "random seed; equal seeds give equal results (default: 0)")


def _add_attention(parser: argparse.ArgumentParser) -> None:
    """Adds what determines the new attention."""
    attention = parser.add_argument_group("attention")
    number = functools.partial(arguments.add_number, attention)
    attention.add_argument(
        "--estimator",
        metavar="NAME",
        help="hedgehog, darkformer, wderf_s, favor+, ... (docs/choosing-features.md; default: "
        "hedgehog)",
    )
    number(
        "--nb_features",
        ranges.FEATURES,
        "N",
        "number of features (default: twice the head width for hedgehog, else 256)",
    )
    number(
        "--exact_window",
        ranges.LENGTH,
        "W",
        "use exact weights for the nearest W residues (default: none)",
    )
    number(
        "--keep_exact",
        ranges.HEAD,
        "N",
        "keep exact attention in the N layers with the largest error (default: 0)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Adds what determines the training of both stages."""
    training = parser.add_argument_group("training")
    number = functools.partial(arguments.add_number, training)
    number("--transfer_steps", ranges.COUNT, "N", "steps of attention transfer (default: 500)")
    number(
        "--transfer_rate",
        ranges.LEARNING_RATE,
        "X",
        "highest learning rate of attention transfer (default: 1e-3 for tuned estimators, "
        "1e-2 for others)",
    )
    training.add_argument(
        "--finetune",
        choices=("none", "lora", "full"),
        help="train nothing, adapters and features, or all parameters afterwards (default: lora)",
    )
    number("--finetune_steps", ranges.COUNT, "N", "steps of fine-tuning (default: 500)")
    number(
        "--finetune_rate",
        ranges.LEARNING_RATE,
        "X",
        "highest learning rate of fine-tuning (default: 1e-3 for lora, 1e-4 for full)",
    )
    number("--rank", ranges.RANK, "R", "rank of adapters (default: 8)")
    number(
        "--kl_weight",
        ranges.WEIGHT,
        "X",
        "weight of the KL divergence from the exact model (default: 1)",
    )
    number("--batch_size", ranges.BATCH_SIZE, "N", "proteins per batch (default: 8)")
    number("--max_length", ranges.ROW, "N", "crop longer proteins to N tokens (default: 512)")
    number("--save_every", ranges.COUNT, "N", "save the state every N steps (default: 50)")


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.errors import UsageError
    from fast_attention.protein_lm.linearize.config import LinearizeConfig
    from fast_attention.protein_lm.linearize.run import run_linearize

    names = [field.name for field in dataclasses.fields(LinearizeConfig)]
    given = {name: getattr(options, name) for name in names}
    config = LinearizeConfig(**{name: x for name, x in given.items() if x is not None})
    try:
        config.attention_fn(causal=True, head_dim=8)
    except ValueError as error:
        raise UsageError(str(error)) from error
    run_linearize(
        options.run_dir,
        options.work_dir,
        options.fasta,
        valid_fasta=options.valid_fasta,
        on_error=options.on_error,
        gin_file=options.gin_file,
        config=config,
    )
