"""The console command ``protein-lm``: finds the subcommand, and makes failures one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

import fast_attention
from fast_attention.protein_lm import pretrained
from fast_attention.protein_lm.cli.commands import COMMANDS
from fast_attention.protein_lm.cli.completion import PrintCompletion
from fast_attention.protein_lm.cli.failures import (
    describe_failure,
    one_line,
    silence_libraries,
    without_places,
)
from fast_attention.protein_lm.compilation_cache import keep_compiled_programs
from fast_attention.protein_lm.distributed.host_threads import provide_threads
from fast_attention.protein_lm.distributed.huge_pages import restart_with_huge_pages
from fast_attention.protein_lm.distributed.stopping import (
    Interrupted,
    Stopped,
    interrupt_on_signals,
)
from fast_attention.protein_lm.errors import UsageError
from fast_attention.protein_lm.files.output_targets import is_special
from fast_attention.protein_lm.messages import note, quietly
from fast_attention.protein_lm.terminal import fill_closed_streams, for_terminal

_DESCRIPTION = """\
Train protein language models on FASTA files, and use them.

  protein-lm train --gin_file=demo --work_dir=runs/demo
  protein-lm evaluate --run_dir=runs/demo --fasta=my_proteins.fasta
  protein-lm score --run_dir=runs/demo --fasta=my_proteins.fasta --output=scores.tsv
  protein-lm mutate --run_dir=runs/demo --fasta=wild_type.fasta --all --output=effects.tsv
  protein-lm sample --run_dir=runs/demo --num_samples=10 --output=new_proteins.fasta
  protein-lm embed --run_dir=runs/demo --fasta=my_proteins.fasta --output=vectors.npz

Without --run_dir, most commands use the model that comes with the package. The options of a
command: protein-lm train --help"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: What follows the command's name; None takes them from the command line.

    Returns:
      The exit status: 0 for success, 1 for a failure whose reason is on stderr, 2 for options that
      contradict each other or (by way of SystemExit) cannot be understood, 130 when stopped
      from the keyboard, 143 when by SIGTERM and 129 when by SIGHUP.
    """
    if arguments is None:
        fill_closed_streams()
        # Messages quote names of files and headers, which may hold any character.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout = for_terminal(sys.stdout)
        if isinstance(sys.stderr, io.TextIOWrapper):
            sys.stderr = for_terminal(sys.stderr)
        # Without it, matplotlib reads a file of the current folder, which may name modules.
        os.environ.setdefault("MATPLOTLIBRC", os.devnull)
    options = _parser().parse_args(arguments)
    if arguments is None and not options.traceback:
        silence_libraries()
    provide_threads()
    if arguments is None:
        keep_compiled_programs()
    if arguments is None and options.command == "train":
        restart_with_huge_pages()
    try:
        with interrupt_on_signals(), quietly(options.quiet):
            if getattr(options, "run_dir", None) == pretrained.FOLDER:
                note("no --run_dir: the model that comes with the package is used")
            COMMANDS[options.command].run(options)
    except Stopped as stopped:
        _print_stopped(options.command, without_places(str(stopped)))
        return stopped.exit_status
    except KeyboardInterrupt as stopped:
        resumable = options.command in ("train", "embed", "score", "mutate", "predict", "linearize")
        # What is written into a pipe is not kept.
        resumable = resumable and not is_special(getattr(options, "output", None) or ".")
        remedy = "; the same command resumes" if resumable else ""
        reason = str(stopped) or "stopped by SIGINT"
        _print_stopped(options.command, f"{reason}{remedy}")
        return stopped.exit_status if isinstance(stopped, Interrupted) else 130
    except BrokenPipeError:
        # The reader of our output has ended; writing again at exit would fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.traceback:
            traceback.print_exc()
        told = describe_failure(error, vars(options))
        print(f"protein-lm {options.command}: error: {told}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _print_stopped(command: str, told: str) -> None:
    # Below the progress bar, and not behind it.
    begin = "\n" if sys.stderr.isatty() else ""
    print(f"{begin}protein-lm {command}: {one_line(told)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "protein-lm",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"protein-lm {fast_attention.__version__}"
    )
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        help="print a script that completes this command in the given shell "
        "(see docs/commands/shell-completion.md), and exit",
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
        # The type of options that have none.
        command.register("type", None, _text)
        module.add_arguments(command)
        command.add_argument(
            "--quiet",
            action="store_true",
            help="print no progress and no notes, only results, warnings and errors",
        )
        command.add_argument(
            "--traceback", action="store_true", help="on failure, print the Python traceback"
        )
    return parser


def _text(text: str) -> str:
    """An option's text, which is empty where a variable of a shell script is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a value, got an empty text")
    return text
