"""``protein-lm score``."""

from __future__ import annotations

import argparse
import time

from fast_attention.protein_lm.cli import arguments, progress

SUMMARY = "compute the log-likelihood and perplexity of each protein"
DESCRIPTION = """\
Compute the log-likelihood and perplexity of each protein, and write a table with a row per protein.

FlaxLM gives the exact log-likelihood (natural logarithm) of the whole protein. FlaxBERT gives the
pseudo-log-likelihood: each residue is masked in turn and predicted from all others, which takes as
many passes as the protein has residues. Perplexity is exp(-mean log-likelihood per residue): lower
is better, and 20 means uniform guessing among the 20 amino acids. An interrupted command resumes
when it is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    arguments.add_fasta(parser, "proteins to score")
    arguments.add_on_error(parser)
    arguments.add_table(parser)
    arguments.add_token_budget(parser)


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.files.tables import EXTENSIONS, find_extension
    from fast_attention.protein_lm.inference.model_inputs import read_for_model
    from fast_attention.protein_lm.inference.score_files import score_to_file
    from fast_attention.protein_lm.loading import load_run

    find_extension(options.output, EXTENSIONS)
    arguments.check_files(options, "output", "skipped_list")
    model, step, _ = load_run(options.run_dir, gin_file=options.gin_file)
    began = time.perf_counter()
    with (
        arguments.skipped_records(options) as skipped,
        progress.residue_bar("score") as advance,
    ):
        records = read_for_model(
            model,
            options.fasta,
            max_length=options.max_length,
            on_error=options.on_error,
            skipped=skipped,
        )
        done = score_to_file(
            model,
            records,
            options.output,
            tokens_per_batch=options.tokens_per_batch,
            max_length=options.max_length,
            origin={"step": step},
            progress=advance,
        )
    progress.report(model, done, time.perf_counter() - began, options.output, options.skipped_list)
