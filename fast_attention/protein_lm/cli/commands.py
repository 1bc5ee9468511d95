"""The subcommands of ``protein-lm``, one module each.

A module has ``SUMMARY`` (one line), ``DESCRIPTION`` (what ``--help`` begins with),
``add_arguments(parser)`` and ``run(options)``. JAX takes a second to import, which ``--help`` and a
mistyped flag should not have to wait for: modules import what they need inside ``run``.
"""

from types import ModuleType

from fast_attention.protein_lm.cli import (
    diagnose,
    embed,
    evaluate,
    export,
    fine_tune,
    import_model,
    info,
    linearize,
    mutate,
    predict,
    sample,
    score,
    train,
)

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "score": score,
    "mutate": mutate,
    "embed": embed,
    "fine-tune": fine_tune,
    "predict": predict,
    "export": export,
    "import": import_model,
    "info": info,
    "diagnose": diagnose,
    "linearize": linearize,
}
"""Modules by the name of their command, in the order of ``protein-lm --help``."""
