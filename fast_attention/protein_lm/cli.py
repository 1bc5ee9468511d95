"""The console command ``protein-lm``: finds the subcommand, and makes failures one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from fast_attention.protein_lm.commands import COMMANDS
from fast_attention.protein_lm.huge_pages import restart_with_huge_pages
from fast_attention.protein_lm.run_folder import RunError
from fast_attention.protein_lm.stopping import Stopped

_DESCRIPTION = """\
Train protein language models on FASTA files, and use them.

  protein-lm train --gin_file=protein_lm_configs/demo.gin --work_dir=runs/demo
  protein-lm evaluate --run_dir=runs/demo --fasta=my_proteins.fasta
  protein-lm sample --run_dir=runs/demo --num_samples=10 --output=new_proteins.fasta

Every command explains itself: protein-lm train --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: What follows the command's name; None takes them from the command line.

    Returns:
      The exit status: 0 for success, 1 for a failure whose reason is on stderr, 2 (by way of
      SystemExit) for arguments that cannot be understood, 130 when stopped from the keyboard and
      143 when by SIGTERM.
    """
    options = _parser().parse_args(arguments)
    if arguments is None and options.command == "train":
        restart_with_huge_pages()
    if arguments is None and not options.traceback:
        # This process is the command's own, and what fails is told below in one line: the logs of
        # libraries would bury that under the tracebacks of their threads.
        logging.disable(logging.ERROR)
    try:
        COMMANDS[options.command].run(options)
    except Stopped as stopped:
        print(f"\nprotein-lm {options.command}: {stopped}", file=sys.stderr)
        return stopped.exit_status
    except KeyboardInterrupt:
        remedy = ", and the same command goes on" if options.command == "train" else ""
        print(f"\nprotein-lm {options.command}: stopped{remedy}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; writing there again at exit would fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunError, FloatingPointError, OSError, SyntaxError, TypeError, ValueError) as error:
        if options.traceback:
            traceback.print_exc()
        print(f"protein-lm {options.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "protein-lm",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument(
            "--traceback", action="store_true", help="on failure, show where in the program it was"
        )
    return parser
