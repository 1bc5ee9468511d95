"""Figures of a model on its way from exact to linear attention: perplexity, errors of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from fast_attention import make_fast_softmax_attention, make_local_attention
from fast_attention.layers.attention.transfer import OutputErrors
from fast_attention.mechanisms.favor.fn import FastAttention
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.linearize.steps import (
    features_of,
    fixed_arrays,
    make_errors,
    with_features,
)
from fast_attention.protein_lm.modeling import metrics
from fast_attention.protein_lm.modeling.train_state import Batch
from fast_attention.recipes import recipe


def layer_errors(exact: FlaxModel, linear: FlaxModel, batches: Sequence[Batch]) -> list[float]:
    """The error of each layer on the hidden states of the exact model; 0 where it is exact.

    Returns:
      ``sqrt(sum |out - exact|^2 / sum |exact|^2)`` over heads and positions, by layer.
    """
    count = jax.jit(make_errors(exact, linear))
    fixed = fixed_arrays(exact, linear)
    found = [jax.device_get(count(linear.weights, fixed, batch)) for batch in batches]

    sums: dict[str, OutputErrors] = jax.tree.map(
        lambda *parts: sum(np.asarray(part, np.float64) for part in parts), *found
    )
    each = [float(np.sqrt(x.error.sum() / max(x.size.sum(), 1e-30))) for x in sums.values()]
    errors = [0.0] * linear.config.num_layers
    numbers = [n for n in range(len(errors)) if n + 1 not in linear.config.exact_layers]
    for number, error in zip(numbers, each, strict=True):
        errors[number] = error
    return errors


def worst_layers(errors: Sequence[float], number: int) -> tuple[int, ...]:
    """The layers, from 1, of the largest errors."""
    order = sorted(range(len(errors)), key=lambda i: (-errors[i], i))
    return tuple(sorted(i + 1 for i in order[:number]))


def perplexity(model: FlaxModel, batches: Iterable[Batch]) -> float:
    """Of the tokens that batches ask for."""
    return float(metrics.combine_metrics(model.batch_sums(batches))["perplexity"])


def without_window(linear: FlaxModel) -> FlaxModel:
    """The same model, whose features do all of the work."""
    made = recipe(linear.attention_fn)
    assert made is not None
    arguments: dict[str, Any] = made.arguments | {"exact_window": None}
    function = make_fast_softmax_attention(**arguments)
    return _around(linear, function)


def without_features(linear: FlaxModel) -> FlaxModel:
    """The same model, whose heads see the exact window and nothing else."""
    function = linear.attention_fn
    assert isinstance(function, FastAttention) and function.exact_window is not None
    causal = function.unidirectional
    # Of causal attention the window counts the position itself.
    reach = function.exact_window - 1 if causal else function.exact_window
    if reach < 1:
        local = make_local_attention(1, unidirectional=causal, look_backward=0)
    else:
        local = make_local_attention(reach, unidirectional=causal, exact_window=True)
    return _around(linear, local)


def _around(linear: FlaxModel, function: Any) -> FlaxModel:
    """The same arrays around another function, where that has them, too."""
    layers = linear.config.exact_layers
    other = linear.with_attention(function, exact_layers=layers)
    parameters = with_features(other.state.parameters, features_of(linear.weights))
    variables = with_features(other.variables, features_of(linear.variables))
    other.set_parameters(parameters, variables)
    return other


def describe_attention(linear: FlaxModel) -> dict[str, Any]:
    """The attention function as plain data."""
    made = recipe(linear.attention_fn)
    assert made is not None
    default = recipe(make_fast_softmax_attention())
    assert default is not None
    changed = {n: x for n, x in made.arguments.items() if x != default.arguments[n]}
    return {"factory": made.factory} | dict(sorted(changed.items()))
