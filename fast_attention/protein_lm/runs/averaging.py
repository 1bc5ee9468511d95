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
from fast_attention.protein_lm.runs.array_records import named

_ALIKE = ("model", "objective", "alphabet", "transformer", "attention")
"""Fields of ``model.json`` in which the models must agree."""


def set_average(model: BuiltModel, others: Mapping[str, BuiltModel]) -> None:
    """Replaces the parameters by the average of them and those of the other models.

    Args:
      model: With its trained parameters.
      others: Models to average with, by name, such as their folders.

    Raises:
      RunError: If a model differs in more than its parameters.
    """
    own, variables = model_file.describe(model), named(model.state.variables)
    for name, other in others.items():
        found = model_file.describe(other)
        for field in _ALIKE:
            if found[field] != own[field]:
                parts = _differences(found[field], own[field])
                raise RunError(
                    f"{name}: cannot be averaged, because its {field} differs in model.json"
                    f"{parts}; average models of one configuration"
                )
        for path, array in named(other.state.variables).items():
            if not np.array_equal(array, variables[path]):
                raise RunError(
                    f"{name}: cannot be averaged, because {path} differs (such as projections of "
                    "random features that were drawn anew, or rounded by export --dtype); average "
                    "models that were trained from one another (experiment.initial_run), exported "
                    "without --dtype"
                )
    every = [model.weights, *(other.weights for other in others.values())]
    average = jax.tree.map(lambda *arrays: sum(arrays) / len(arrays), *every)
    model.set_parameters(average, model.state.variables)


def _differences(found: Any, own: Any) -> str:
    """The names of what differs in two descriptions, in brackets; empty where they have none."""
    if not isinstance(found, Mapping) or not isinstance(own, Mapping):
        return ""
    names = [name for name in {**own, **found} if found.get(name) != own.get(name)]
    return f" ({', '.join(names)})"
