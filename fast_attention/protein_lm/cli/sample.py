"""``protein-lm sample``."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fast_attention.protein_lm import messages, ranges
from fast_attention.protein_lm.cli import arguments
from fast_attention.protein_lm.errors import UsageError

if TYPE_CHECKING:
    from fast_attention.protein_lm.data.fasta import FastaRecord
    from fast_attention.protein_lm.flax_model import FlaxModel

SUMMARY = "sample new proteins, or fill in masked residues"
DESCRIPTION = """\
Sample new proteins from a trained model and write them to a FASTA file; each header has the
log-likelihood of the protein.

  protein-lm sample --run_dir=runs/demo --num_samples=10 --output=new_proteins.fasta

A FlaxLM samples residues from left to right, optionally after a given beginning (--prompt). A
FlaxBERT, or a model trained by span corruption, fills in spans of a given protein: * is one
residue, [5] is five residues, [2-8] is two to eight (span corruption only). All other residues stay
unchanged:

  protein-lm sample --run_dir=runs/bert --infill='MKT**AYIA[5]GG' --output=filled.fasta"""

# What only one of the two ways has.
_WRITING = (
    "prompt",
    "prompt_fasta",
    "min_length",
    "max_length",
    "repetition_penalty",
    "repetition_window",
)
_FILLING = ("rounds",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    number = functools.partial(arguments.add_number, parser)
    arguments.add_run_dir(parser)
    number(
        "--num_samples",
        ranges.COUNT,
        "N",
        "number of samples for each prompt or each protein to fill in (default: 10; with "
        "--infill: 1)",
    )
    starts = parser.add_mutually_exclusive_group()
    starts.add_argument(
        "--prompt",
        metavar="RESIDUES",
        help="first residues of every protein, such as MKT",
    )
    starts.add_argument(
        "--prompt_fasta",
        metavar="FILE",
        help="several prompts, each a record of a FASTA file (or a row of a table, .csv or .tsv)",
    )
    starts.add_argument(
        "--infill",
        metavar="PROTEIN",
        help="a FASTA file, or residues, with spans to fill in: * for each residue, [5] for five, "
        "[2-8] for two to eight",
    )
    number(
        "--rounds",
        ranges.COUNT,
        "N",
        "with --infill of a FlaxBERT: fill in the masked residues in N rounds, the most "
        "certain predictions first (default: one residue per round, the slowest)",
    )
    number(
        "--temperature",
        ranges.TEMPERATURE,
        "T",
        "sampling temperature: below 1 gives more typical proteins, above 1 more unusual "
        "ones, 0 always the most probable residue (default of this and the next options: "
        "FlaxModel.sampling_kwargs of the trained model, or 1)",
    )
    number("--top_k", ranges.COUNT, "K", "sample only from the K most probable residues")
    number(
        "--top_p",
        ranges.PROBABILITY,
        "P",
        "sample only from the most probable residues whose total probability is P",
    )
    number(
        "--repetition_penalty",
        ranges.PENALTY,
        "R",
        "a value above 1, such as 1.2, makes recently sampled residues less probable (default: 1)",
    )
    number(
        "--repetition_window",
        ranges.COUNT,
        "N",
        "number of previous residues that --repetition_penalty counts (default: all)",
    )
    number(
        "--min_length",
        ranges.LENGTH,
        "N",
        "minimum length in residues, including the prompt (default: 1)",
    )
    number(
        "--max_length",
        ranges.LENGTH,
        "N",
        "maximum length in residues, including the prompt (default: the model's limit)",
    )
    arguments.add_seed(parser, "random seed; equal seeds give equal proteins (default: 0)")
    parser.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="the FASTA file; .gz compresses it (default: -, standard output)",
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.data.fasta import write_fasta
    from fast_attention.protein_lm.files.output_targets import status_stream
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.wording import counted, place

    arguments.check_files(options, "output")
    shortest, longest = options.min_length, options.max_length
    if shortest is not None and longest is not None and shortest > longest:
        raise UsageError(
            f"--min_length={options.min_length} is more than --max_length={options.max_length}: "
            "lower the first, or raise the second"
        )
    for name in _WRITING if options.infill else _FILLING:
        if getattr(options, name) is not None:
            way = "when masked residues are filled in" if options.infill else "without --infill"
            raise UsageError(f"--{name} has no effect {way}: leave it out")
    model = load_run(options.run_dir, gin_file=options.gin_file).model
    total, records = (_fill if options.infill else _write)(model, options)
    # Proteins go to the file as they are drawn; it gets its name when it is whole.
    write_fasta(options.output, messages.counting(records, "sampling", "proteins", total))
    messages.note(
        f"{counted(total, 'protein')} written to {place(options.output)}",
        status_stream(options.output),
    )


def _write(model: FlaxModel, options: argparse.Namespace) -> tuple[int, Iterator[FastaRecord]]:
    from fast_attention.protein_lm.data.fasta import FastaRecord, read_proteins
    from fast_attention.protein_lm.inference.sampling import draw_proteins, encode_prompt

    number = 10 if options.num_samples is None else options.num_samples
    if options.prompt_fasta:
        alphabet = model.domain.vocab
        prompts = list(read_proteins(options.prompt_fasta, alphabet=alphabet, unique_ids=True))
    else:
        prompts = [FastaRecord("sample", "", (options.prompt or "").upper())]
    # All of them before the first protein is drawn.
    for prompt in prompts:
        try:
            encode_prompt(model, prompt.sequence, options.max_length)
        except ValueError as error:
            where = f"{options.prompt_fasta}: {prompt.id!r}" if options.prompt_fasta else "--prompt"
            raise ValueError(f"{where}: {error}") from None

    def records() -> Iterator[FastaRecord]:
        for prompt in prompts:
            yield from draw_proteins(
                model,
                number,
                prompt=prompt.sequence,
                name=prompt.id,
                seed=options.seed,
                min_length=options.min_length,
                max_length=options.max_length,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                repetition_penalty=options.repetition_penalty,
                repetition_window=options.repetition_window,
            )

    return number * len(prompts), records()


def _fill(model: FlaxModel, options: argparse.Namespace) -> tuple[int, Iterator[FastaRecord]]:
    from fast_attention.protein_lm.data.fasta import FastaRecord, read_proteins
    from fast_attention.protein_lm.inference.infilling import MARKS, infill_proteins, without_spans
    from fast_attention.protein_lm.inference.model_inputs import CUT, longest_record

    number = 1 if options.num_samples is None else options.num_samples
    alphabet = model.domain.vocab
    if os.path.exists(options.infill):
        limit, too_long = longest_record(alphabet, crop=CUT)
        proteins = list(
            read_proteins(
                options.infill,
                alphabet=alphabet,
                marks=MARKS,
                unique_ids=True,
                max_residues=limit,
                too_long=too_long,
            )
        )
    elif strange := set(without_spans(options.infill.upper())) - set(alphabet.symbols):
        shown = options.infill if len(options.infill) <= 60 else f"{options.infill[:57]}..."
        raise ValueError(
            f"--infill={shown} is neither a file nor residues: there is no such file, and "
            f"{min(strange)!r} is none of the residues {alphabet.symbols}; check the path, or give "
            "residues with * for each masked one, [5] for five of them"
        )
    else:
        proteins = [FastaRecord("infill", "", options.infill.upper())]
    records = infill_proteins(
        model,
        proteins,
        num_samples=number,
        rounds=options.rounds,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    return number * len(proteins), records
