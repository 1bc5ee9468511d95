"""``protein-lm mutate``."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.cli import arguments
from fast_attention.protein_lm.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from fast_attention.protein_lm.data.alphabet import Alphabet
    from fast_attention.protein_lm.data.fasta import FastaRecord
    from fast_attention.protein_lm.inference.mutations import Variant

SUMMARY = "predict the effects of mutations"
DESCRIPTION = """\
Score mutations by the change in log-likelihood relative to the wild type, and write a table with a
row per mutation. A score below 0 means that the mutant is less probable than the wild type; its
function is then often impaired.

  protein-lm mutate --run_dir=runs/demo --fasta=wild_type.fasta --all --heatmap=effects.png \\
      --output=effects.tsv

A12G replaces the A at position 12 (counted from 1) by G. A12G:L40P is a mutant with two mutations.
With FlaxLM there are also A12del, A12_L14del (deletions), A12_L13insGS (an insertion) and
A12delinsGS (a replacement).

A wild type has at most 50,000 residues. Mutants are scored and written in groups, so memory does
not grow with their number. With --output=FILE, the same command resumes an interrupted one."""


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
        help="file with one mutation per line, or a table (tab or comma) with a column 'mutant', "
        "as in ProteinGym; a column 'id' selects the wild type if there are several; - is "
        "standard input. Or the mutations themselves: A12G,L40P:K41R means A12G, and L40P "
        "together with K41R",
    )
    what.add_argument("--all", action="store_true", help="all substitutions at every position")
    what.add_argument(
        "--variants",
        metavar="FILE",
        help="FASTA file with complete mutant sequences of one wild type",
    )
    parser.add_argument(
        "--positions",
        metavar="RANGES",
        help="with --all: only at these positions, such as 10-50,60",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="FlaxLM: log-likelihood-ratio. FlaxBERT: masked-marginals (the default; mutated "
        "positions are masked), wt-marginals (no masking, one pass for all mutations) or "
        "pseudo-log-likelihood-ratio (slow)",
    )
    arguments.add_table(parser)
    parser.add_argument(
        "--heatmap",
        metavar="FILE",
        help="a picture (PNG) of the scores of single substitutions in one protein",
    )
    arguments.add_tokens_per_batch(parser)


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.files.output_targets import status_stream
    from fast_attention.protein_lm.files.tables import EXTENSIONS, find_extension, open_table
    from fast_attention.protein_lm.inference import (
        effect_files,
        heatmap,
        mutation_effects,
        partial_work,
    )
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.wording import counted, place

    find_extension(options.output, EXTENSIONS)
    arguments.check_files(options, "output", "heatmap")
    if options.positions and not options.all:
        raise UsageError("--positions needs --all: give both, or neither")
    model, step, _ = load_run(options.run_dir, gin_file=options.gin_file)
    proteins = _work(options, model.domain.vocab)
    if options.heatmap:
        begin = list(itertools.islice(proteins, 2))
        heatmap.check(begin)
        proteins = itertools.chain(begin, proteins)
    method = mutation_effects.choose_method(model, options.method)
    columns = mutation_effects.score_columns(method)
    types = {"id": str, "mutant": str} | dict.fromkeys(columns, float)
    settings = partial_work.settings(
        "mutate", model, options.tokens_per_batch, None, {"method": method, "step": step}
    )
    residues = model.domain.vocab.standard_symbols
    count = resumed = number = 0
    drawn: tuple[FastaRecord, np.ndarray] | None = None
    with (
        partial_work.open_work(options.output, settings) as work,
        open_table(options.output, types) as write,
        messages.progress("mutate", "proteins read") as bar,
    ):
        for scored in effect_files.score_in_parts(
            model,
            work,
            proteins,
            method=method,
            tokens_per_batch=options.tokens_per_batch,
            progress=bar.update,
        ):
            for variant, values in zip(scored.variants, scored.scores.tolist(), strict=True):
                write([scored.wild_type.id, variant.name, *values])
            number += scored.begins
            count += len(scored.variants)
            resumed += len(scored.variants) * scored.resumed
            if options.heatmap:
                wild = scored.wild_type
                values = scored.scores[:, 0]
                matrix = heatmap.effect_matrix(wild.sequence, scored.variants, values, residues)
                drawn = wild, matrix if drawn is None else heatmap.merge(drawn[1], matrix)
        if drawn is not None:
            places = _places(options, drawn[0])
            span = None if places is None else (places[0], places[-1] + 1)
            heatmap.plot_heatmap(options.heatmap, *drawn, columns[0], residues=residues, span=span)
    partial_work.remove_parts(work)
    status = status_stream(options.output, options.heatmap)
    messages.note(
        f"{counted(count, 'mutant')} of {counted(number, 'protein')} written to "
        f"{place(options.output)}",
        status,
    )
    if resumed:
        before = counted(resumed, "mutant")
        messages.note(f"{before} of these had been scored before the interruption", status)


def _work(
    options: argparse.Namespace, vocab: Alphabet
) -> Iterator[tuple[FastaRecord, Iterable[Variant]]]:
    """Yields the wild types, and the variants of each, in the letters of an alphabet."""
    from fast_attention.protein_lm.data.fasta import read_proteins
    from fast_attention.protein_lm.inference.model_inputs import CUT, longest_record
    from fast_attention.protein_lm.inference.mutation_files import variants_of_list
    from fast_attention.protein_lm.inference.mutations import iterate_substitutions, variant_of

    limit, too_long = longest_record(vocab, crop=CUT)
    rules = {"alphabet": vocab, "max_residues": limit, "too_long": too_long}
    wild_types = _wild_types(options, rules)
    if options.all:
        for wild in wild_types:
            places = _places(options, wild)
            yield wild, iterate_substitutions(wild.sequence, places, vocab.standard_symbols)
        return
    known = list(wild_types)
    if options.mutations:
        yield from variants_of_list(options.mutations, known)
        return
    if len(known) > 1:
        raise ValueError(
            f"--variants needs exactly one wild type, but there are {len(known)}: run the "
            "command for each"
        )
    (wild,) = known
    mutants = read_proteins(options.variants, **rules)
    variants = (variant_of(mutant.id, mutant.sequence, wild.sequence) for mutant in mutants)
    # For a picture they are looked at twice.
    yield wild, list(variants) if options.heatmap else variants


def _wild_types(options: argparse.Namespace, rules: Mapping[str, Any]) -> Iterator[FastaRecord]:
    from fast_attention.protein_lm.data.fasta import FastaRecord, read_proteins

    if options.sequence is None:
        yield from read_proteins(options.fasta, unique_ids=True, **rules)
    elif len(options.sequence) > rules["max_residues"]:
        raise ValueError(
            f"--sequence has more than {rules['max_residues']:,} residues. {rules['too_long']}"
        )
    elif options.sequence:
        yield FastaRecord("protein", "", options.sequence.upper())
    else:
        raise UsageError("--sequence is empty: give the residues of the wild type")


def _places(options: argparse.Namespace, wild: FastaRecord) -> list[int] | None:
    """The positions of ``--positions``, from 0; None where all are meant."""
    from fast_attention.protein_lm.inference.mutations import parse_positions

    return parse_positions(options.positions, len(wild.sequence)) if options.positions else None
