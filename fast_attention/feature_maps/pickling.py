"""Pickling of functions compiled by ``jax.jit``, such as those of ``jax.numpy``.

Pickle tries to write the Python function inside, does not find it under its name, and raises an
error. Here such a function is written by its name.
"""

from __future__ import annotations

import pkgutil
from typing import Any, NamedTuple


class Place(NamedTuple):
    """The location of a function.

    Attributes:
      name: "module:name".
    """

    name: str


def to_places(fields: dict[str, Any]) -> dict[str, Any]:
    """Replaces functions that are found under their own name; other values do not change."""
    return {name: _place_of(x) if callable(x) else x for name, x in fields.items()}


def from_places(fields: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`to_places`."""
    return {
        name: pkgutil.resolve_name(x.name) if isinstance(x, Place) else x
        for name, x in fields.items()
    }


def _place_of(function: Any) -> Any:
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    try:
        return Place(name) if pkgutil.resolve_name(name) is function else function
    except (ImportError, AttributeError, ValueError):
        return function
