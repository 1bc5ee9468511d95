"""The model classes that ``model.json`` can name."""

from __future__ import annotations

from typing import TypeVar

from fast_attention.protein_lm.modeling.built_model import BuiltModel

Model = TypeVar("Model", bound=type[BuiltModel])

_CLASSES: dict[str, type[BuiltModel]] = {}


def register_model(cls: Model) -> Model:
    """Decorates a class of models that a run folder can describe by its name."""
    _CLASSES[cls.__name__] = cls
    return cls


def is_registered(cls: type) -> bool:
    """Whether `register_model` decorates this class, and not only one that it inherits from."""
    return cls in _CLASSES.values()


def registered_models() -> dict[str, type[BuiltModel]]:
    """All of them by name."""
    return dict(_CLASSES)
