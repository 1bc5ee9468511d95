"""Arguments that several commands have, so that they are called and explained the same."""

from __future__ import annotations

import argparse


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Adds ``--run_dir``, the trained model."""
    parser.add_argument(
        "--run_dir", required=True, metavar="FOLDER", help="the --work_dir of a trained run"
    )


def add_fasta(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Adds ``--fasta``, one or more files of proteins."""
    parser.add_argument(
        "--fasta",
        action="append",
        required=True,
        metavar="FILE",
        help=f"{meaning}, FASTA, plain or gzip; may be repeated",
    )


def add_seed(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Adds ``--seed``."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=meaning)
