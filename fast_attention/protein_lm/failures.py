"""What a user is told when a command fails: what went wrong, and what to do."""

from __future__ import annotations

import logging
import re
import sys
import threading

import absl.logging

from fast_attention.protein_lm.output_files import OutputError
from fast_attention.protein_lm.run_folder import RunError

_EXPECTED = (RunError, FloatingPointError, OSError, TypeError, ValueError)
_MEMORY = (
    "take a smaller --batch_size or --tokens_per_batch (in training a smaller "
    "experiment.batch_size_per_device), or shorter rows"
)

_DISK = {
    "No space left on device": "the disk is full: make room",
    "Disk quota exceeded": "your share of the disk is used up: make room",
    "File too large": "a file is larger than is allowed here: raise the limit",
    "Read-only file system": "the folder is read-only: change that",
}


def describe_failure(error: Exception) -> str:
    """Says what went wrong in the words of the error, without places in the program."""
    kind, text = type(error).__name__, _without_places(str(error)) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"out of memory: {_MEMORY}"
    if kind in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: {_MEMORY} ({text.splitlines()[0]})"
    for reason, remedy in _DISK.items():
        # The libraries that write checkpoints have errors of their own, with this text inside.
        if reason in text and not isinstance(error, OutputError):
            return f"{remedy}, or write elsewhere ({text.splitlines()[0][:300]})"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, SyntaxError):
        return (
            f"{error.filename or 'the --gin_bindings'}, line {error.lineno}: {error.msg} Write "
            f"each setting as NAME.PARAMETER = VALUE. Got {(error.text or '').strip()[:80]!r}"
        )
    if isinstance(error, ModuleNotFoundError):
        return f'{text}. Packages for proteins: pip install "fast-attention[protein]"'
    if isinstance(error, TypeError) and (name := _configurable(error)):
        return (
            f"{text.rstrip('.')}. Check the kinds of the values that the settings of {name} have."
        )
    if isinstance(error, _EXPECTED):
        return text
    return (
        f"unexpected {kind}: {text}. This may be a mistake in the program: --traceback shows where "
        "it was."
    )


def silence_libraries() -> None:
    """Keeps tracebacks of libraries off stderr, in a process that runs one command.

    Orbax logs the traceback of what it raises, which is told in one line in the end. So is what
    fails in a thread, such as TensorBoard's writer, or in an event loop.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.disable(logging.ERROR)
    threading.excepthook = _tell_thread


def _tell_thread(failure: threading.ExceptHookArgs) -> None:
    if isinstance(failure.exc_value, Exception):
        print(f"warning: {describe_failure(failure.exc_value)}", file=sys.stderr)


def _configurable(error: Exception) -> str | None:
    found = re.search(r"^ *In call to configurable '(.+?)'", str(error), flags=re.MULTILINE)
    return found[1] if found else None


def _without_places(text: str) -> str:
    """Drops what gin adds for programmers, and puts the file and the line behind the message."""
    text = re.sub(r" in config string: \n.*", ".", text, flags=re.DOTALL)
    text = re.sub(r"\n *In call to configurable .*", "", text)
    text = re.sub(
        r'\n *In (file|bindings string)( ".*?",)? ?line (\d+)\n *(.*)(\n *\^)?',
        lambda found: f" In{found[2] or ' the settings,'} line {found[3]}: {found[4]}",
        text,
    )
    return text.strip()
