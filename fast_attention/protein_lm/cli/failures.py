"""The message of a command that fails: what went wrong, and what to do."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Collection

import absl.logging

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_targets import OutputError
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.machine_failures import OUT_OF_MEMORY, machine_failure, memory_remedy

_EXPECTED = (RunError, FloatingPointError, OSError, TypeError, ValueError)
_EXPLAINED = (RunError, OutputError, FastaError)
"""Errors of this package, which say themselves what to do."""


def describe_failure(error: Exception, options: Collection[str] = ()) -> str:
    """Says what went wrong in the words of the error, without places in the program.

    Args:
      error: What ended the command.
      options: The names of the command's options, of which those that save memory are named.
    """
    told = _describe(error, options)
    # What we say ourselves is one line but for names of files.
    ours = isinstance(error, (*_EXPLAINED, OSError, ValueError))
    return one_line(told) if ours else " ".join(told.split())


def one_line(text: str) -> str:
    r"""Writes line ends as ``\n``: names of files may have them, but a message has one line."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _describe(error: Exception, options: Collection[str]) -> str:
    kind, text = type(error).__name__, without_places(str(error)) or type(error).__name__
    if isinstance(error, _EXPLAINED):
        return text
    if (reason := machine_failure(error)) is not None:
        return _describe_machine(reason, error, text, options)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, SyntaxError):
        return (
            f"{error.filename or 'the --gin_bindings'}, line {error.lineno}: {error.msg} Write "
            f"each setting as NAME.PARAMETER = VALUE. Got {(error.text or '').strip()[:80]!r}"
        )
    if isinstance(error, ModuleNotFoundError):
        return f'{text}. Packages for proteins: pip install "fast-attention[protein]"'
    # A question is a remedy already.
    named = None if text.endswith("?") else _configurable(error)
    if isinstance(error, TypeError) and named:
        return f"{text.rstrip('.')}. Check the types of the values in the settings of {named}."
    if isinstance(error, _EXPECTED):
        return text
    return f"unexpected {kind}: {text}. This may be a bug: --traceback shows where it occurred."


def _describe_machine(reason: str, error: Exception, text: str, options: Collection[str]) -> str:
    if reason == OUT_OF_MEMORY:
        reason = f"{reason}: {memory_remedy(options)}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {reason}"
    line = text.splitlines()[0][:300]
    return reason if line in ("MemoryError", "") else f"{reason} ({line})"


def silence_libraries() -> None:
    """Keeps tracebacks of libraries off stderr, in a process that runs one command.

    Orbax logs the traceback of what it raises, and leaves tasks unread that failed for the same
    reason; the command reports it in one line at the end. What fails in a thread, such as
    TensorBoard's writer, is one line, too.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.disable(logging.ERROR)
    threading.excepthook = _tell_thread
    sys.unraisablehook = _drop


def _tell_thread(failure: threading.ExceptHookArgs) -> None:
    if isinstance(failure.exc_value, Exception):
        print(f"warning: {describe_failure(failure.exc_value)}", file=sys.stderr)


def _drop(failure: sys.UnraisableHookArgs) -> None:
    """Python ignores these errors already, after it has printed a traceback."""


def _configurable(error: Exception) -> str | None:
    found = re.search(r"^ *In call to configurable '(.+?)'", str(error), flags=re.MULTILINE)
    return found[1] if found else None


def without_places(text: str) -> str:
    """Removes what gin adds for programmers, and puts the file and the line after the message."""
    text = re.sub(r" in config string: \n.*", ".", text, flags=re.DOTALL)
    text = re.sub(r"\n *In call to configurable .*", "", text)
    text = re.sub(
        r'\n *In (file|bindings string)( ".*?",)? ?line (\d+)\n *(.*)(\n *\^)?',
        lambda found: f" In{found[2] or ' the settings,'} line {found[3]}: {found[4]}",
        text,
    )
    return text.strip()
