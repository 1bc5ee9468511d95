"""Arguments that several commands have, so that they are called and explained the same."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fast_attention.protein_lm import pretrained, ranges
from fast_attention.protein_lm.data.alphabets import PROTEIN
from fast_attention.protein_lm.data.skipped_records import SkippedRecords, list_skipped, tell
from fast_attention.protein_lm.ranges import Range


def add_number(
    parser: argparse._ActionsContainer,
    flag: str,
    allowed: Range,
    metavar: str,
    meaning: str,
    default: float | None = None,
) -> None:
    """Adds an option that takes a number of a range."""

    def parse(text: str) -> float:
        try:
            return allowed.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument(flag, type=parse, metavar=metavar, help=meaning, default=default)


def add_run_dir(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds ``--run_dir``, the trained model, and ``--gin_file``.

    Args:
      parser: Of the command.
      required: Whether it has to be given; the default is the model that comes with the package.
    """
    parser.add_argument(
        "--run_dir",
        required=required,
        default=None if required else pretrained.FOLDER,
        metavar="FOLDER",
        help="the --work_dir of a trained run, or the folder of an exported model"
        + ("" if required else " (default: the model that comes with this package)"),
    )
    add_gin_file(parser)


def add_gin_file(parser: argparse.ArgumentParser) -> None:
    """Adds ``--gin_file``, which makes a model that its folder cannot describe."""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="the gin file that the model was trained with; needed only for a model with code of "
        "your own, such as an attention function; may be repeated. A gin file can run any code",
    )


def add_fasta(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Adds ``--fasta``, one or more files of proteins or folders of those."""
    parser.add_argument(
        "--fasta",
        action="append",
        required=True,
        metavar="PATH",
        help=f"{meaning}: a FASTA file (or a table, .csv or .tsv), plain or gzip, or "
        "a folder of FASTA files, or - for standard input; may be repeated",
    )


def add_table(parser: argparse.ArgumentParser) -> None:
    """Adds ``--output``, a table."""
    parser.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="the table: .tsv or .csv (add .gz to compress), or .parquet (default: -, a table "
        "with tabs on standard output)",
    )


def add_on_error(parser: argparse.ArgumentParser) -> None:
    """Adds ``--on_error`` and ``--skipped_list``, which `skipped_records` makes use of."""
    add_on_error_choice(parser, "raise")
    parser.add_argument(
        "--skipped_list",
        metavar="FILE",
        help="with --on_error=skip: a table of all proteins that were left out, .tsv or .csv (add "
        ".gz to compress), or .parquet",
    )


def add_on_error_choice(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds ``--on_error`` alone, for a command that has its own place for the list."""
    parser.add_argument(
        "--on_error",
        choices=("raise", "skip", "replace"),
        default=default,
        help="what to do with a protein that cannot be read, for instance because of a gap or a "
        "digit: raise stops (the default), skip leaves it out and reports it at the end, replace "
        "reads unknown letters as X (nucleotides: N) and stops at anything else",
    )


@contextlib.contextmanager
def skipped_records(options: argparse.Namespace) -> Iterator[SkippedRecords]:
    """Gives the collector for ``read_proteins(..., on_error=options.on_error, skipped=...)``.

    At the end of the ``with`` block, what was left out is printed to stderr, and listed in the file
    of ``--skipped_list``.
    """
    with list_skipped(options.skipped_list) as skipped:
        yield skipped
    tell(skipped)


_INPUTS = (
    "fasta",
    "valid_fasta",
    "table",
    "split_file",
    "families",
    "mutations",
    "variants",
    "prompt_fasta",
    "infill",
)


_PICTURE = (".png",)


def check_files(options: argparse.Namespace, *outputs: str, evaluation: Path | None = None) -> None:
    """Checks, before any work, what a command is to write.

    Args:
      options: Of the command.
      outputs: Names of the options that are files to write.
      evaluation: What is written to the run's folder as well.

    Raises:
      OutputError: If one cannot be written, is another output as well, or is a file that the
        command reads.
      ValueError: If the name of a table or a picture ends in no format of its kind.
    """
    from fast_attention.protein_lm.files.output_files import check_output, check_outputs
    from fast_attention.protein_lm.files.output_targets import OutputError
    from fast_attention.protein_lm.files.tables import EXTENSIONS, find_extension

    if evaluation is not None:
        try:
            check_output(evaluation)
        except OutputError as error:
            # For example in another user's run.
            raise OutputError(f"{error}, with --output=FILE") from error
    given = {f"--{name}": getattr(options, name) for name in outputs}
    check_outputs({"evaluation.json": evaluation} | given, input_files(options))
    formats = dict.fromkeys(("skipped_list", "per_protein"), EXTENSIONS)
    formats |= dict.fromkeys(("heatmap", "plot"), _PICTURE)
    for name, extensions in formats.items():
        if name in outputs and (path := getattr(options, name)) is not None:
            find_extension(path, extensions)


def input_files(options: argparse.Namespace) -> Iterator[str | Path]:
    """Yields all files that a command reads, those in its folders among them."""
    from fast_attention.protein_lm.data.fasta import fasta_paths
    from fast_attention.protein_lm.runs.run_folder import files_read

    for name in ("run_dir", "model"):
        if folder := getattr(options, name, None):
            yield from files_read(Path(folder))
    if getattr(options, "model", None) and not options.run_dir:
        yield from _files_of_noted_run(Path(options.model))
    for name in _INPUTS:
        given = getattr(options, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            # A path that cannot be read is reported by whatever reads it.
            with contextlib.suppress(ValueError):
                yield from fasta_paths(path)


def _files_of_noted_run(folder: Path) -> Iterator[Path]:
    """Yields what is read of the run that the folder of a predictor names."""
    from fast_attention.protein_lm.errors import RunError
    from fast_attention.protein_lm.finetune.finetuned import read_about
    from fast_attention.protein_lm.runs.run_folder import files_read

    # What cannot be read is reported by whatever reads it.
    with contextlib.suppress(RunError):
        noted = read_about(folder)["run_dir"]
        if noted is not None:
            yield from files_read(Path(os.path.realpath(folder / noted)))


def add_token_budget(parser: argparse.ArgumentParser) -> None:
    """Adds ``--tokens_per_batch`` and ``--max_length``."""
    add_tokens_per_batch(parser)
    add_number(
        parser,
        "--max_length",
        ranges.LENGTH,
        "N",
        "use the first N residues of a longer protein (default: proteins are read whole, and "
        f"one of more than {PROTEIN.longest:,} residues is an error)",
    )


def add_tokens_per_batch(parser: argparse.ArgumentParser) -> None:
    """Adds ``--tokens_per_batch``."""
    add_number(
        parser,
        "--tokens_per_batch",
        ranges.TOKENS_PER_BATCH,
        "N",
        "residues per batch; lower it to save memory (default: 16384)",
        default=16384,
    )


def add_seed(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Adds ``--seed``."""
    add_number(parser, "--seed", ranges.SEED, "N", meaning, default=0)
