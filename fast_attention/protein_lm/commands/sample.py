"""``protein-lm sample``."""

from __future__ import annotations

import argparse

from fast_attention.protein_lm.commands import arguments

SUMMARY = "write new proteins"
DESCRIPTION = """\
Write new proteins, drawn from a trained model, to a FASTA file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    parser.add_argument(
        "--num_samples", type=int, default=10, metavar="N", help="how many proteins (default: 10)"
    )
    parser.add_argument(
        "--prompt",
        default="",
        metavar="RESIDUES",
        help="residues that every protein begins with, such as MKT",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="below 1 more typical proteins, above 1 more unusual ones, 0 always the most probable "
        "residue (default: 1)",
    )
    parser.add_argument(
        "--top_k", type=int, metavar="K", help="draw among the K most probable residues only"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="draw among the fewest residues that together have probability P",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="most residues of a protein, the prompt included (default: the model's limit)",
    )
    arguments.add_seed(parser, "equal seeds give equal proteins")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the FASTA file; .gz compresses it"
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.fasta import write_fasta
    from fast_attention.protein_lm.loading import load_run
    from fast_attention.protein_lm.output_files import check_output
    from fast_attention.protein_lm.sampling import sample_proteins

    check_output(options.output)
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
