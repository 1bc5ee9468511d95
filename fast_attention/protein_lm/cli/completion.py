"""``protein-lm --print-completion SHELL``: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")

_FILES = ("FILE", "PATH", "PATH[=WEIGHT]")
_FOLDERS = ("FOLDER",)
"""Options whose values are paths are known by their ``metavar``."""


class PrintCompletion(argparse.Action):
    """Prints the script for a shell and exits, as ``--help`` prints help."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        """Takes what `argparse.ArgumentParser.add_argument` passes."""
        super().__init__(
            option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, choices=SHELLS, **options
        )

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        """Prints the script."""
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error(
                "--print-completion needs the package shtab: "
                'pip install "fast-attention[completion]"'
            )
        for action in _actions(parser):
            completed = {**dict.fromkeys(_FILES, shtab.FILE), **dict.fromkeys(_FOLDERS, shtab.DIR)}
            if isinstance(action.metavar, str) and action.metavar in completed:
                action.complete = completed[action.metavar]  # pyright: ignore
        print(shtab.complete(parser, values))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the options of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
