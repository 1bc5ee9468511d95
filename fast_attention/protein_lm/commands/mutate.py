"""``protein-lm mutate``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fast_attention.protein_lm.commands import arguments

if TYPE_CHECKING:
    from fast_attention.protein_lm.fasta import FastaRecord
    from fast_attention.protein_lm.mutations import Variant

SUMMARY = "predict the effects of mutations"
DESCRIPTION = """\
Say how much more, or less, probable a protein becomes by mutations, in a table with a row for each.
Below 0 the model finds the mutant less probable than the wild type, which usually means that it
works less well.

  protein-lm mutate --run_dir=runs/demo --fasta=wild_type.fasta --all --heatmap=effects.png \\
      --output=effects.tsv

A12G turns the A at position 12 (counted from 1) into a G, A12G:L40P does two things at once. With
FlaxLM there are also A12del, A12_L14del (deletions), A12_L13insGS (an insertion) and A12delinsGS (a
replacement)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    wild = parser.add_mutually_exclusive_group(required=True)
    wild.add_argument(
        "--fasta",
        action="append",
        metavar="PATH",
        help="the wild type, or several: a FASTA file, plain or gzip; may be repeated",
    )
    wild.add_argument("--sequence", metavar="RESIDUES", help="the residues of the wild type")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--mutations",
        metavar="FILE",
        help="one mutation per line, or a table (tab or comma) with a column 'mutant', as those of "
        "ProteinGym; a column 'id' says which of several wild types is meant",
    )
    what.add_argument("--all", action="store_true", help="all 19 substitutions at every position")
    what.add_argument(
        "--variants", metavar="FILE", help="whole mutant proteins, FASTA, of one wild type"
    )
    parser.add_argument(
        "--positions", metavar="RANGES", help="with --all: only there, such as 10-50,60"
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="FlaxLM: log-likelihood-ratio. FlaxBERT: masked-marginals (the default; mutated "
        "positions are hidden), wt-marginals (nothing is hidden, one pass for all mutations) or "
        "pseudo-log-likelihood-ratio (slow)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the table: .tsv or .csv, .gz behind either compresses it, or .parquet",
    )
    parser.add_argument(
        "--heatmap",
        metavar="FILE",
        help="a picture (PNG) of the effects of single substitutions in one protein",
    )
    arguments.add_tokens_per_batch(parser)


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from tqdm import tqdm

    from fast_attention.protein_lm import heatmap, mutation_effects
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.output_files import status_stream
    from fast_attention.protein_lm.tables import EXTENSIONS, find_extension, open_table

    find_extension(options.output, EXTENSIONS)
    arguments.check_files(options, "output", "heatmap")
    if options.positions and not options.all:
        raise ValueError("--positions says where --all substitutes: give both, or neither")
    work = _work(options)
    if options.heatmap:
        heatmap.check([variant for _, variants in work for variant in variants], len(work))
    model = load_run(options.run_dir, gin_file=options.gin_file).model
    method = mutation_effects.choose_method(model, options.method)
    columns = mutation_effects.score_columns(method)
    types = {"id": str, "mutant": str} | dict.fromkeys(columns, float)
    count = 0
    with (
        open_table(options.output, types) as write,
        tqdm(desc="mutate", unit=" proteins read", disable=None) as bar,
    ):
        for wild_type, variants in work:
            scores = mutation_effects.score_variants(
                model,
                wild_type.sequence,
                variants,
                method=method,
                tokens_per_batch=options.tokens_per_batch,
                progress=bar.update,
            )
            for variant, *values in zip(variants, *scores.values(), strict=True):
                write([wild_type.id, variant.name, *map(float, values)])
            count += len(variants)
            if options.heatmap:
                values = scores[columns[0]]
                heatmap.plot_heatmap(
                    options.heatmap, wild_type.sequence, variants, values, columns[0]
                )
    print(
        f"{count:,} mutants of {len(work):,} proteins written to {options.output}",
        file=status_stream(options.output, options.heatmap),
    )


def _work(options: argparse.Namespace) -> list[tuple[FastaRecord, list[Variant]]]:
    """The wild types, and the variants of each."""
    from fast_attention.protein_lm.fasta import FastaRecord
    from fast_attention.protein_lm.fasta_files import read_proteins
    from fast_attention.protein_lm.mutation_files import variants_of_list
    from fast_attention.protein_lm.mutations import (
        all_substitutions,
        parse_positions,
        variant_of,
    )

    if options.sequence is None:
        wild_types = list(read_proteins(options.fasta, unique_ids=True))
    elif options.sequence:
        wild_types = [FastaRecord("protein", "", options.sequence.upper())]
    else:
        raise ValueError("--sequence is empty: give the residues of the wild type")
    if options.mutations:
        return variants_of_list(options.mutations, wild_types)
    if options.all:
        work = []
        for wild in wild_types:
            places = None
            if options.positions:
                places = parse_positions(options.positions, len(wild.sequence))
            work.append((wild, all_substitutions(wild.sequence, places)))
        return work
    if len(wild_types) > 1:
        raise ValueError(
            f"--variants are those of one wild type, but there are {len(wild_types)}: run the "
            "command for each"
        )
    (wild,) = wild_types
    mutants = read_proteins(options.variants)
    return [(wild, [variant_of(mutant.id, mutant.sequence, wild.sequence) for mutant in mutants])]
