"""``protein-lm score``."""

from __future__ import annotations

import argparse
import functools

from fast_attention.protein_lm.cli import arguments, progress

SUMMARY = "compute the log-likelihood and perplexity of each protein"
DESCRIPTION = """\
Compute the log-likelihood and perplexity of each protein, and write a table with a row per protein.

FlaxLM computes the log-likelihood (natural logarithm) of the whole protein. FlaxBERT computes the
pseudo-log-likelihood: each residue in turn is masked and predicted from all others, which takes one
pass per residue. Perplexity is exp(-mean log-likelihood per residue). Lower is better; 20 means
uniform guessing among the 20 amino acids. With --output=FILE, the same command resumes an
interrupted one."""


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
    from fast_attention.protein_lm.inference.score_files import score_to_file

    find_extension(options.output, EXTENSIONS)

    compute = functools.partial(
        score_to_file,
        output=options.output,
        tokens_per_batch=options.tokens_per_batch,
        max_length=options.max_length,
    )
    progress.process_proteins(options, "score", compute)
