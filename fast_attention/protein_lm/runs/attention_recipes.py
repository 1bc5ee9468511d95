"""Attention functions as plain data: the name of the factory, and its arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from fast_attention.feature_maps.elementwise import kernel_name
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import check_fields, matches, one_line, shown
from fast_attention.recipes import FACTORIES, recipe

OWN = "own"
"""The name of the field that stands for code that is not part of fast_attention."""

# Arguments beyond this are no sizes of an attention function; seeds are any integers.
_MAX_SIZE = 2**20
_MAX_DEPTH = 8


def describe(attention_fn: Any) -> dict[str, Any]:
    """``factory`` and ``arguments``, or ``own`` with a name where no factory of ours made it."""
    found = recipe(attention_fn)
    if found is None or found.factory not in FACTORIES:
        return {OWN: name_of(attention_fn)}
    arguments = {}
    for name, hint in _hints(found.factory).items():
        value = found.arguments[name]
        if _is_nested(hint):
            value = describe(value)
        elif callable(value):
            function: Any = value
            value = kernel_name(function)
        if not _is_nested(hint) and not matches(value, hint):
            return {OWN: f"{found.factory}({name}={name_of(found.arguments[name])})"}
        arguments[name] = value
    return {"factory": found.factory, "arguments": arguments}


def own_part(described: Any) -> dict[str, Any] | None:
    """The part of a description that stands for code that is not ours; None without one."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(described, dict) or OWN in described:
            return described
        arguments = described.get("arguments")
        described = arguments.get("attention_fn") if isinstance(arguments, dict) else None
    return None


def build(path: Path, place: str, described: Any, depth: int = 0) -> Any:
    """Makes the attention function of a description.

    Args:
      path: The file that it comes from, for errors.
      place: Where in the file it is.
      described: From `describe`, or None for exact attention.
      depth: How many functions it is inside of.

    Raises:
      RunError: If the factory or an argument is unknown, of another type, or out of its range.
    """
    if described is None and depth == 0:
        return None
    fields = check_fields(path, place, described, {"factory": str, "arguments": dict})
    name = fields["factory"]
    if name not in FACTORIES:
        raise RunError(
            f"{path}: {place}.factory is {shown(name)}; expected one of {', '.join(FACTORIES)}"
        )
    place = f"{place}.arguments"
    hints = _hints(name)
    nested = [argument for argument, hint in hints.items() if _is_nested(hint)]
    plain = {argument: hint for argument, hint in hints.items() if argument not in nested}
    given = fields["arguments"]
    arguments = check_fields(
        path, place, {key: value for key, value in given.items() if key not in nested}, plain
    )
    for argument, value in arguments.items():
        if argument != "seed" and type(value) is int and abs(value) > _MAX_SIZE:
            raise RunError(
                f"{path}: {place}.{argument} is {value}; at most {_MAX_SIZE} is expected"
            )
    for argument in nested:
        if depth == _MAX_DEPTH:
            raise RunError(f"{path}: {place} nests more than {_MAX_DEPTH} attention functions")
        inner = f"{place}.{argument}"
        arguments[argument] = build(path, inner, given.get(argument), depth + 1)
    try:
        return FACTORIES[name](**arguments)
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path}: {place} do not describe an attention function: {one_line(error)}"
        ) from error


def gin_lines(described: Any, parameter: str) -> list[str]:
    """Gin bindings that give a parameter the attention function of a description.

    Args:
      described: From `describe`, compared with what is known by `build`.
      parameter: Such as ``"FlaxModel.attention_fn"``.
    """
    return _gin_lines(described, parameter, "")


def _gin_lines(described: Any, parameter: str, scope: str) -> list[str]:
    if described is None:
        return [f"{parameter} = None"]
    name = f"{scope}{described['factory']}"
    lines = [f"{parameter} = @{name}()"]
    for argument, value in described["arguments"].items():
        if isinstance(value, dict):
            lines += _gin_lines(value, f"{name}.{argument}", f"{scope}inner/")
        else:
            lines.append(f"{name}.{argument} = {value!r}")
    return lines


def name_of(value: Any) -> str:
    """The name of a class or a function, or of the class of another object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _is_nested(hint: Any) -> bool:
    """Whether an argument is another attention function."""
    return get_origin(hint) is Callable


def _hints(factory: str) -> dict[str, Any]:
    hints = get_type_hints(FACTORIES[factory])
    del hints["return"]
    return hints
