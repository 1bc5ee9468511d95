"""JSON files of run folders, read as data that anybody may have written.

What a file holds is compared with names and types that the reader knows, and everything else is an
error that names the file and the field.
"""

from __future__ import annotations

import json
import math
import os
import stat
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.machine_failures import machine_failure

MAX_BYTES = 16 * 2**20
"""Size of the largest JSON file that is read."""

_MAX_INTEGER = 2**63 - 1
_SHOWN = 60


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Args:
      path: The file.

    Raises:
      RunError: If it is absent, larger than `MAX_BYTES`, no plain file or not JSON.
    """
    text = read_bounded(path, MAX_BYTES)
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is not JSON ({one_line(error)})") from None


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes.

    Raises:
      RunError: If the file is absent, larger, or a device, a pipe or a folder.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise RunError(f"{path} has {size:,} bytes; at most {limit:,} were expected")
        return file.read(limit)


def read_text(path: Path) -> str:
    """The text of a plain file in UTF-8 of at most `MAX_BYTES`.

    Raises:
      RunError: As `read_bounded`, or if the file is not UTF-8.
    """
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: it is not UTF-8 ({one_line(error)})") from error


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file for reading.

    Raises:
      RunError: If the file is absent, or a device, a pipe or a folder.
    """
    try:
        # Opening a pipe for reading waits for a writer unless it is opened without blocking.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except OSError as error:
        reason = machine_failure(error) or error.strerror
        raise RunError(f"{path} cannot be read: {reason}") from error
    raise RunError(f"{path} is not a plain file")


def check_fields(
    path: Path, place: str, value: Any, hints: Mapping[str, Any], *, optional: bool = False
) -> dict[str, Any]:
    """Compares an object of a JSON file with names and types.

    Args:
      path: The file, for errors.
      place: Where in the file the object is, such as ``"transformer"``; empty for the whole.
      value: The object.
      hints: Types by name: `bool`, `int`, `float`, `str`, `None`, `dict`, lists, unions and
        literals of these.
      optional: Whether names may be absent.

    Returns:
      The object, with integers as floats where floats are expected.

    Raises:
      RunError: At an unknown or missing name, or a value of another type.
    """
    if not isinstance(value, dict):
        raise RunError(f"{path}: {place or 'the file'} is {shown(value)}; expected an object")
    prefix = f"{place}." if place else ""
    for name in value:
        if name not in hints:
            raise RunError(
                f"{path}: {prefix}{shown_name(name)} is unknown to this version of fast_attention; "
                f"expected {', '.join(hints)}"
            )
    found = {}
    for name, hint in hints.items():
        if name not in value:
            if optional:
                continue
            raise RunError(f"{path}: {prefix}{name} is missing; expected {spell(hint)}")
        if not matches(value[name], hint):
            raise RunError(
                f"{path}: {prefix}{name} is {shown(value[name])}; expected {spell(hint)}"
            )
        found[name] = float(value[name]) if _is_float(value[name], hint) else value[name]
    return found


def matches(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file has a type; types that JSON lacks match nothing."""
    if hint is None or hint is type(None):
        return value is None
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return type(value) is int and abs(value) <= _MAX_INTEGER
    if hint is float:
        return matches(value, int) or (isinstance(value, float) and math.isfinite(value))
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if hint is list or origin is list:
        return isinstance(value, list) and all(matches(item, inner[0]) for item in value if inner)
    if hint is dict or origin is dict:
        return isinstance(value, dict) and all(
            matches(item, inner[1]) for item in value.values() if inner
        )
    return False


def spell(hint: Any) -> str:
    """A type in the words of JSON."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    names |= {dict: "an object", list: "a list", None: "null", type(None): "null"}
    if isinstance(hint, type | None) and hint in names and not get_args(hint):
        return names[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(spell, inner))))
    if origin is Literal:
        return " or ".join(f'"{option}"' for option in inner)
    if origin in (list, dict):
        return f"{names[origin]} of which each is {spell(inner[-1])}"
    return ""


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, and short."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def shown_name(name: str) -> str:
    """A name out of a file as an error shows it: as it is, or quoted where it is no plain word."""
    return name if name.isidentifier() and len(name) <= _SHOWN else shown(name)


def _is_float(value: Any, hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return type(value) is int and float in options and int not in options


def one_line(error: Exception | str) -> str:
    """The first line of an error, at most 300 characters of it."""
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]} ..."
