"""Equality of attention functions by their options."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


class EqualOptions:
    """A base of frozen dataclasses that are equal where their fields are, arrays by value.

    Their hash is that of the fields, of arrays that of shape and type, so that ``jax.jit`` takes
    them as static arguments and compiles once for equal ones.
    """

    def __eq__(self, other: object) -> bool:
        """Whether the other is of the same class with equal fields."""
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(a, b) for a, b in zip(_fields(self), _fields(other), strict=True))

    def __hash__(self) -> int:
        """Hashes the class and the fields."""
        return hash((type(self), *(_hashable(x) for x in _fields(self))))


def _fields(x: Any) -> list[Any]:
    return [vars(x)[field.name] for field in dataclasses.fields(x)]


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.Array)


def _hashable(x: Any) -> Any:
    return (x.shape, str(x.dtype)) if _is_array(x) else x


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not _is_array(a) or not _is_array(b):
        return not _is_array(a) and not _is_array(b) and a == b
    # Of a traced array nothing is known but which one it is.
    known = not isinstance(a, Tracer) and not isinstance(b, Tracer)
    return known and _hashable(a) == _hashable(b) and bool(np.array_equal(a, b))
