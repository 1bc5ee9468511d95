"""Compares the settings of a run with those of the command that resumes it."""

from __future__ import annotations

import ast
import math
import os
import re
from pathlib import Path
from typing import Any

from fast_attention.protein_lm.distributed import processes
from fast_attention.protein_lm.errors import RunError

_FILES = ("experiment.train_files", "experiment.valid_files", "experiment.test_files")
_INITIAL_RUN = "experiment.initial_run"
_LENGTHS = ("experiment.max_train_steps", "experiment.epochs")


def compare_settings(path: Path, before: str, now: str, asked: str) -> bool:
    """Checks that a run can be resumed with the settings of now.

    The mesh may be another one, which is a matter of the machine. So may the names of the FASTA
    files, whose content `data_record` compares. The run that this one began from may be elsewhere,
    if it is not where it was. A run may have more steps or epochs than before.

    Args:
      path: The folder of the run.
      before: The operative gin configuration of the run.
      now: The same of the command that resumes it.
      asked: The part of `now` that was asked for, without defaults. A default of which the run
        knows nothing came with a later version of this package, and changes nothing.

    Returns:
      Whether the run becomes longer.

    Raises:
      RunError: If another setting differs, or the run would become shorter.
    """
    old, new, wanted = settings(before), settings(now), settings(asked)
    changes, longer = [], False
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name) or (name not in old and name not in wanted):
            continue
        if name in _FILES or name.startswith("make_mesh.") or name.endswith(".mesh"):
            continue
        if name in _LENGTHS and _number(old.get(name)) < _number(new.get(name)):
            longer = True
            continue
        if name == _INITIAL_RUN and _has_moved(old.get(name), new.get(name)):
            processes.note(
                f"{path} started from {_value(old[name])!r}, which does not exist any more; "
                f"{_value(new[name])!r} is assumed to be the same run"
            )
            continue
        changes += [f"-{old[name]}"] if name in old else []
        changes += [f"+{new[name]}"] if name in new else []
    if changes:
        shorter = any(name in change for change in changes for name in _LENGTHS)
        raise RunError(
            f"{path} holds a run with other settings (- there, + asked for now): "
            + "; ".join(changes)
            + ". Give another --work_dir, or the settings of that run to resume it"
            + ("; it can be given more steps, not fewer" if shorter else "")
        )
    return longer


def lengths(config: str) -> dict[str, str]:
    """The settings of the length of a run, such as its steps; a resumed run may change them."""
    found = settings(config)
    return {name: found[name] for name in _LENGTHS if name in found}


def settings(config: str) -> dict[str, str]:
    """The settings of a gin configuration as gin writes it, by name: the text of each."""
    found: dict[str, str] = {}
    name = ""
    for line in config.splitlines():
        start = re.match(r"([\w./]+) = ", line)
        if start:
            name = start[1]
            found[name] = line
        elif name and line[:1].isspace():
            found[name] = f"{found[name].removesuffix(chr(92))}{line.strip()}"
        else:
            name = ""
    return found


def _number(setting: str | None) -> float:
    """A number of steps or epochs; None is no limit."""
    value = _value(setting)
    return value if isinstance(value, (int, float)) else math.inf


def _has_moved(before: str | None, now: str | None) -> bool:
    """Whether two settings name folders, of which that of before is not there any more."""
    then, there = _value(before), _value(now)
    return isinstance(then, str) and isinstance(there, str) and not os.path.exists(then)


def _value(setting: str | None) -> Any:
    """The plain value of a setting; None where it is something else."""
    try:
        return ast.literal_eval((setting or "").partition(" = ")[2].strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
