"""``protein-lm embed``."""

from __future__ import annotations

import argparse
import functools

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.cli import arguments, progress

SUMMARY = "compute vectors (embeddings) of proteins"
DESCRIPTION = """\
Compute vectors (embeddings) of proteins. Similar proteins have similar vectors, so the vectors can
be compared, clustered, or used as input of a classifier.

By default there is one vector per protein, the mean over its residues; --pool=none writes one
vector per residue. The same command resumes an interrupted one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    arguments.add_run_dir(parser)
    arguments.add_fasta(parser, "proteins to embed")
    arguments.add_on_error(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the vectors, in the format of the extension: .npz (NumPy), .h5 (HDF5) or .parquet",
    )
    parser.add_argument(
        "--pool",
        choices=("mean", "max", "sum", "bos", "eos", "none"),
        default="mean",
        help="how the vectors of the residues are combined: mean (the default), max or sum; bos "
        "and eos take the model's state at the begin or the end of the protein; none keeps one "
        "vector per residue",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=_layer,
        default=["last"],
        metavar="LAYER",
        help="layers of the model to take vectors from: last is the output of the final norm "
        "(the default); 1, 2, ... are blocks counted from the first, -1, -2, ... from the last; "
        "0 is before the first block; several may be given",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="float16 halves the file and keeps 3 digits (default: float32)",
    )
    arguments.add_token_budget(parser)


def _layer(text: str) -> float | str:
    if text == "last":
        return text
    try:
        return ranges.LAYER.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected 'last' or {ranges.LAYER}, got {text[:80]!r}"
        ) from None


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from fast_attention.protein_lm.files.tables import find_extension
    from fast_attention.protein_lm.inference import embedding
    from fast_attention.protein_lm.inference.array_files import EXTENSIONS
    from fast_attention.protein_lm.inference.embedding_files import embed_to_file

    find_extension(options.output, EXTENSIONS)
    config = embedding.EmbeddingConfig(
        layers=tuple(options.layers) if len(options.layers) > 1 else options.layers[0],
        pool=None if options.pool == "none" else options.pool,
        dtype=options.dtype,
        tokens_per_batch=options.tokens_per_batch,
        max_length=options.max_length,
    )

    compute = functools.partial(embed_to_file, output=options.output, config=config)
    progress.process_proteins(options, "embed", compute, unique_ids=True)
