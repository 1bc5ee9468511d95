"""``protein-lm diagnose``."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.cli import arguments

if TYPE_CHECKING:
    from fast_attention.protein_lm.evaluation import diagnosis

SUMMARY = "measure the error of a trained model's attention against exact attention"
DESCRIPTION = """\
Measure the error of a trained model's attention against exact softmax attention, for each layer
and head, on some proteins.

The error is relative: 0 is exact. The error of uniform attention (the mean over all visible
residues) is also printed. A head whose error is not below this baseline gains nothing from its
features. The number of effective keys is exp(entropy) of the exact attention weights; the fewer,
the harder the head is to approximate.

A model with exact attention has no error. With --estimator, --nb_features, --projection or
--exact_window the command reports the error that such random features would have instead. With
--target_error it reports how many features are needed:

  protein-lm diagnose --run_dir=runs/demo --fasta=my_proteins.fasta
  protein-lm diagnose --run_dir=runs/exact --fasta=my_proteins.fasta --nb_features=256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    number = functools.partial(arguments.add_number, parser)
    arguments.add_run_dir(parser)
    arguments.add_fasta(parser, "proteins to measure on")
    arguments.add_on_error(parser)
    number(
        "--max_proteins",
        ranges.COUNT,
        "N",
        "use N proteins, spread evenly over the files (default: 32)",
        default=32,
    )
    number(
        "--max_length",
        ranges.LENGTH,
        "N",
        "use the first N residues of a longer protein; the time of exact attention grows "
        "with the square of the length (default: 512)",
        default=512,
    )
    parser.add_argument(
        "--estimator",
        metavar="NAME",
        help="measure these random features instead of the model's own attention: favor+, "
        "hyperbolic, wderf_s, ... (docs/choosing-features.md; default, with one of the next "
        "options: wderf_s)",
    )
    number(
        "--nb_features",
        ranges.FEATURES,
        "M",
        "number of features (default, with one of the others: 256)",
    )
    parser.add_argument(
        "--projection",
        metavar="NAME",
        help="how the features are drawn: iid, orthogonal, orthogonal_antithetic, ... (default: "
        "orthogonal_antithetic for estimators with parameters from data, orthogonal for others)",
    )
    number(
        "--exact_window",
        ranges.LENGTH,
        "W",
        "use exact weights for the W nearest residues and features for the others (default: "
        "no window)",
    )
    number(
        "--target_error",
        ranges.ERROR,
        "X",
        "also report how many features each layer needs for a relative error of its "
        "attention matrix of at most X, such as 0.3",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="also write the results: .json, or a table: .tsv or .csv (add .gz to compress), or "
        ".parquet",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="also plot the results (PNG): the error of each head, and the exact and approximate "
        "attention matrices of one head",
    )
    number("--layer", ranges.HEAD, "N", "layer whose matrices --plot draws (default: 1)", default=1)
    number("--head", ranges.HEAD, "N", "head of that layer (default: 1)", default=1)
    arguments.add_seed(parser, "random seed of the features (default: 0)")


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.evaluation import diagnosis, diagnosis_report
    from fast_attention.protein_lm.files.output_targets import status_stream
    from fast_attention.protein_lm.inference.model_inputs import read_for_model
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.modeling.encoding import longest_protein
    from fast_attention.protein_lm.wording import place

    if options.output:
        diagnosis_report.check_name(options.output)
    if options.plot:
        # Told before the work where it is missing.
        import matplotlib  # noqa: F401

    arguments.check_files(options, "output", "plot", "skipped_list")
    features = _features(options)
    model, step, folder = load_run(options.run_dir, gin_file=options.gin_file)
    diagnosis_report.check_head(model, options.layer, options.head)
    longest = longest_protein(model)
    max_length = options.max_length if longest is None else min(options.max_length, longest)
    with arguments.skipped_records(options) as skipped:
        records = read_for_model(
            model,
            options.fasta,
            max_length=max_length,
            on_error=options.on_error,
            skipped=skipped,
        )
        chosen = diagnosis.spread_evenly(records, options.max_proteins)
        sequences = [record.sequence for record in chosen]
        found = diagnosis.diagnose(
            model,
            sequences,
            features=features,
            target_error=options.target_error,
            max_length=max_length,
            seed=options.seed,
        )
        about = {
            "run_dir": str(folder.path),
            "step": step,
            "fasta": list(options.fasta),
            "max_length": max_length,
        }
        if options.output:
            diagnosis_report.write(options.output, found, about, options.target_error)
        if options.plot:
            matrices = diagnosis.head_matrices(
                model,
                sequences[0],
                options.layer,
                options.head,
                features=features,
                parameters=found.parameters,
                max_length=max_length,
            )
            protein = chosen[0].id
            diagnosis_report.plot(
                options.plot, found, matrices, options.layer, options.head, protein
            )
        status = status_stream(options.output, options.plot, options.skipped_list)
        print(diagnosis_report.format_diagnosis(found, options.target_error), file=status)
        written = [path for path in (options.output, options.plot) if path]
        if written:
            print(f"\nwritten to {' and '.join(map(place, written))}", file=status)


def _features(options: argparse.Namespace) -> diagnosis.Features | None:
    """What is to be judged in place of the model's own attention, checked."""
    from fast_attention.protein_lm.evaluation import diagnosis

    named = ("estimator", "nb_features", "projection", "exact_window")
    given = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    if not given and options.target_error is None:
        return None
    features = diagnosis.Features(**given)
    features.attention_fn(causal=True)
    return features
