"""How attention functions were made: the factory's name and the arguments, to write them to a file.

An attention function is an object, which a file can only hold as code. What its factory was called
with is plain data, and calling the factory again gives an equal function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from fast_attention.feature_maps.pickling import from_places, to_places
from fast_attention.mechanisms.checks import check_flag

Parameters = ParamSpec("Parameters")
Made = TypeVar("Made")

FACTORIES: dict[str, Callable[..., Any]] = {}
"""The factories of attention functions, by name."""

_ATTRIBUTE = "_recipe"


class Recipe(NamedTuple):
    """A call of a factory.

    Attributes:
      factory: Its name, a key of `FACTORIES`.
      arguments: Every argument by name, defaults included.
    """

    factory: str
    arguments: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles functions by their names, see :mod:`fast_attention.feature_maps.pickling`."""
        return _recipe_from, (self.factory, to_places(self.arguments))


def _recipe_from(factory: str, arguments: dict[str, Any]) -> Recipe:
    return Recipe(factory, from_places(arguments))


def recorded(make: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """Decorates a function so that `recipe` knows how its results were made.

    The recipe is an attribute beside the fields of a result: equality and hash stay as they are,
    and ``dataclasses.replace`` drops it.
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        made = make(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        object.__setattr__(made, _ATTRIBUTE, Recipe(make.__name__, dict(call.arguments)))
        return made

    # gin asks for the signature without looking behind wrappers.
    wrapper.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper


def attention_factory(make: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """Decorates a factory of attention functions: `recorded`, and an entry of `FACTORIES`.

    Every argument that the factory annotates as ``bool`` must be a flag, else ValueError is raised.
    """
    signature = inspect.signature(make)
    flags = [name for name, x in signature.parameters.items() if x.annotation in (bool, "bool")]

    @functools.wraps(make)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        given = signature.bind(*args, **kwargs).arguments
        for name in flags:
            if name in given:
                check_flag(name, given[name])
        return make(*args, **kwargs)

    FACTORIES[make.__name__] = made = recorded(checked)
    return made


def recipe(made: Any) -> Recipe | None:
    """The call that made an object; None where no decorated factory made it."""
    found = getattr(made, _ATTRIBUTE, None)
    return found if isinstance(found, Recipe) else None
