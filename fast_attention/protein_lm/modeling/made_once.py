"""Compiled functions are made once for equal arguments: equal models share their programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

_KEPT = 64


def made_once(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Decorates a function that makes a compiled function from hashable arguments.

    Equal arguments give the same object, which JAX traces and compiles once. The last 64 are kept.
    Where an argument cannot be hashed, such as a structure with a mutable option, each call makes
    another one.
    """
    cached = functools.lru_cache(_KEPT)(make)

    @functools.wraps(make)
    def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        try:
            hash((args, tuple(kwargs.items())))
        except TypeError:
            return make(*args, **kwargs)
        return cached(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    return get
