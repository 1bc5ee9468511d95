"""Options given by name, or together in a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Bundle = TypeVar("Bundle")


def bundle_of(
    kind: type[Bundle], name: str, given: Bundle | None, options: Mapping[str, Any]
) -> Bundle:
    """Returns the bundle that a call was given, or makes it of the options given by name.

    Raises:
      TypeError: for both at once, or an option that the bundle does not have.
    """
    if given is None:
        return kind(**options)
    if options:
        raise TypeError(
            f"{name}= and {', '.join(sorted(options))} are given: pass all of them in "
            f"{kind.__name__}, or leave {name} out"
        )
    return given
