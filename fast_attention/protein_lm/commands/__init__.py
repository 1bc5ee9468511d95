"""The subcommands of ``protein-lm``, one module each.

A module has ``SUMMARY`` (one line), ``DESCRIPTION`` (what ``--help`` begins with),
``add_arguments(parser)`` and ``run(options)``. JAX takes a second to import, which ``--help`` and a
mistyped flag should not have to wait for: modules import what they need inside ``run``.
"""

from types import ModuleType

from fast_attention.protein_lm.commands import evaluate, fine_tune, predict, sample, train

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "fine-tune": fine_tune,
    "predict": predict,
}
"""Modules by the name of their command, in the order of ``protein-lm --help``."""
