"""The average of the parameters of trained models that differ in their training only.

Models that were trained from one another, or from a common one, often predict better when their
parameters are averaged.

Reference: Wortsman et al., "Model soups", arXiv:2203.05482.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.runs import model_file
from fast_attention.protein_lm.runs.array_records import find_unsound, named

_ALIKE = ("model", "objective", "alphabet", "transformer", "attention")
"""Fields of ``model.json`` in which the models must agree."""

_OF_TRAINING = (
    "dropout_rate",
    "attention_dropout_rate",
    "remat",
    "redraw_interval",
    "recalibrate_interval",
)
"""Settings of the transformer in which they may differ."""


def set_average(model: BuiltModel, others: Mapping[str, BuiltModel]) -> None:
    """Replaces the parameters by the average of them and those of the other models.

    Args:
      model: With its trained parameters.
      others: Models to average with, by name, such as their folders.

    Raises:
      RunError: If a model differs in more than its parameters, or the average is not finite.
    """
    own, variables = _describe(model), named(model.variables)
    for name, other in others.items():
        if other.tokens != model.tokens:
            raise RunError(
                f"{name}: cannot be averaged, because the ids of its special tokens differ: "
                f"{other.tokens}, not {model.tokens}; average models of one configuration"
            )
        found = _describe(other)
        for field in _ALIKE:
            if found[field] != own[field]:
                parts = _differences(found[field], own[field])
                raise RunError(
                    f"{name}: cannot be averaged, because its {field} differs in model.json"
                    f"{parts}; average models of one configuration"
                )
        for path, array in named(other.variables).items():
            if not np.array_equal(array, variables[path]):
                raise RunError(
                    f"{name}: cannot be averaged, because {path} differs (such as projections of "
                    "random features that were drawn anew, or rounded by export --dtype); average "
                    "models that were trained from one another (experiment.initial_run), exported "
                    "without --dtype"
                )
    every = [model.weights, *(other.weights for other in others.values())]
    average = jax.tree.map(lambda *arrays: sum(arrays) / len(arrays), *every)
    if unsound := find_unsound(average):
        raise RunError(
            f"{unsound} of the average is not finite: check the models, a parameter of one of them "
            "is infinite, not a number, or too large"
        )
    model.set_parameters(average, model.variables)


def _describe(model: BuiltModel) -> dict[str, Any]:
    described = model_file.describe(model)
    settings = described["transformer"]
    shared = {name: x for name, x in settings.items() if name not in _OF_TRAINING}
    return described | {"transformer": shared}


def _differences(found: Any, own: Any) -> str:
    """The names of what differs in two descriptions, in brackets; empty where they have none."""
    if not isinstance(found, Mapping) or not isinstance(own, Mapping):
        return ""
    names = [name for name in {**own, **found} if found.get(name) != own.get(name)]
    return f" ({', '.join(names)})"
