"""``protein-lm evaluate``."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from fast_attention.protein_lm import pretrained, ranges
from fast_attention.protein_lm.cli import arguments

SUMMARY = "measure how well a trained model predicts proteins"
DESCRIPTION = """\
Measure how well a trained model predicts the residues of some proteins, and compare it with n-gram
baselines. Perplexity is exp(mean loss per residue): lower is better, and 20 means uniform guessing
among the 20 amino acids. Accuracy is the share of residues whose most probable prediction is right.

All proteins are loaded into memory, with about one byte per residue, while other commands stream
their input. If they do not fit, split them into several files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    number = functools.partial(arguments.add_number, parser)
    arguments.add_run_dir(parser)
    arguments.add_fasta(parser, "proteins to predict")
    arguments.add_on_error(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where to write the figures as JSON (default: evaluation.json in the --run_dir; "
        "an earlier evaluation of other proteins is kept there as evaluation-DATE.json)",
    )
    parser.add_argument(
        "--per_protein",
        metavar="FILE",
        help="also write a table with one row per protein: .tsv or .csv (add .gz to compress), or "
        ".parquet",
    )
    parser.add_argument(
        "--split_file",
        metavar="FILE",
        help="a table (TSV or CSV, plain or gzip) with columns 'accession' and 'component': "
        "proteins of one component are relatives, and error bars are taken over components",
    )
    parser.add_argument(
        "--families",
        metavar="FILE",
        help="a table whose first column has ids and whose second has families, for figures of "
        "each family (default: the components of --split_file)",
    )
    number("--batch_size", ranges.BATCH_SIZE, "N", "proteins per batch; lower it to save memory")
    arguments.add_seed(parser, "random seed: which residues FlaxBERT predicts (default: 0)")
    number(
        "--num_seeds",
        ranges.SEEDS,
        "N",
        "repeat N times with other residues for FlaxBERT (default: 1)",
        default=1,
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.evaluation import evaluation, evaluation_files, report
    from fast_attention.protein_lm.files.output_files import write_json
    from fast_attention.protein_lm.files.output_targets import status_stream
    from fast_attention.protein_lm.files.tables import write_table
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.runs.run_folder import RunFolder
    from fast_attention.protein_lm.wording import place

    last = options.seed + options.num_seeds - 1
    ranges.check("--seed plus --num_seeds minus 1", last, ranges.SEED)
    # The package is not written to.
    keeps = options.output is None and not pretrained.is_pretrained(options.run_dir)
    own = None
    if keeps and Path(options.run_dir).is_dir():
        own = RunFolder(Path(options.run_dir)).evaluation
    arguments.check_files(options, "output", "per_protein", "skipped_list", evaluation=own)
    model, step, folder = load_run(options.run_dir, gin_file=options.gin_file)
    with arguments.skipped_records(options) as skipped:
        found = evaluation.evaluate_on(
            model,
            options.fasta,
            evaluation.baselines_of(folder),
            batch_size=options.batch_size,
            seed=options.seed,
            num_seeds=options.num_seeds,
            split_file=options.split_file,
            families=options.families,
            on_error=options.on_error,
            skipped=skipped,
        )
        about = {"run_dir": str(folder.path), "step": step, "date": evaluation_files.now()}
        result = about | found.result
        # The figures come last: where they are, the table is.
        if options.per_protein:
            write_table(options.per_protein, found.per_protein)
        kept = None
        if options.output:
            write_json(options.output, result)
        elif keeps:
            kept = evaluation_files.write_evaluation(folder, result)
        written = [str(options.output or folder.evaluation)] if options.output or keeps else []
        written += [options.per_protein] if options.per_protein else []
        told = report.format_evaluation(result)
        if written:
            told += f"\n\nwritten to {' and '.join(map(place, written))}"
        if kept is not None:
            told += f"\nthe earlier evaluation, of other proteins or settings, is now {kept}"
        print(told, file=status_stream(*written, options.skipped_list))
