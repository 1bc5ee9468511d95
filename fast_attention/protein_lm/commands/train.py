"""``protein-lm train``."""

from __future__ import annotations

import argparse

from fast_attention.protein_lm.commands import arguments

SUMMARY = "train a model, or resume its training"
DESCRIPTION = """\
Train a model and write it to a folder. A run that was stopped goes on from its last checkpoint
when the same command is given again. Without --fasta, the proteins that come with the package are
used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="the settings, a gin file such as protein_lm_configs/demo.gin; may be repeated",
    )
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="SETTING",
        help="one more setting, such as 'FlaxModel.num_layers = 4'; may be repeated, and wins "
        "over the files",
    )
    parser.add_argument(
        "--work_dir", required=True, metavar="FOLDER", help="where the run is written; one run each"
    )
    for flag, meaning in (
        (
            "--fasta",
            "proteins to train on: a FASTA file, plain or gzip, or a folder of them; may be "
            "repeated",
        ),
        ("--valid_fasta", "proteins to validate on during training; may be repeated"),
        ("--test_fasta", "proteins to evaluate on at the end; may be repeated"),
    ):
        parser.add_argument(flag, action="append", metavar="PATH", help=meaning)
    arguments.add_on_error_choice(parser, None)


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    import gin

    from fast_attention.protein_lm import gin_registry

    files = {
        "train_files": options.fasta,
        "valid_files": options.valid_fasta,
        "test_files": options.test_fasta,
    }
    bindings = [f"experiment.{name} = {paths!r}" for name, paths in files.items() if paths]
    if options.on_error:
        bindings.append(f"experiment.on_error = {options.on_error!r}")
    gin_registry.configure(options.gin_file, options.gin_bindings + bindings)
    gin.get_configurable("experiment")(options.work_dir)
