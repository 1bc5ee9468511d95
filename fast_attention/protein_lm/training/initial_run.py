"""What a training run takes over from another one, whose attention function may differ.

The model may also have more layers, see :mod:`.added_layers`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fast_attention.mechanisms.favor.fn import FastAttention
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.runs import model_file
from fast_attention.protein_lm.runs.array_records import describe, differences
from fast_attention.protein_lm.runs.model_file import OwnPartError
from fast_attention.protein_lm.runs.stored_models import load_stored, open_stored
from fast_attention.protein_lm.training.added_layers import add_layers, count_added
from fast_attention.protein_lm.wording import counted
from fast_attention.softmax_attention import make_softmax_attention


class Beginning(NamedTuple):
    """Arrays to begin with.

    Attributes:
      parameters: Those of the earlier run, and of layers that the model has more.
      variables: The other arrays, attention projections among them; None where the attention
        function is another one, and has to draw its own.
      drawn: Whether layers that the run has drew new projections: all of them, or those that had
        exact attention there.
    """

    parameters: Any
    variables: Any | None
    drawn: bool


def check_initial_run(path: Path, model: FlaxModel) -> None:
    """Checks, without reading arrays, that a model can begin with the parameters of a run.

    Args:
      path: Of a run or an exported folder.
      model: The one that begins with them.

    Raises:
      RunError: If the folder is no run's, or its model has another alphabet or other parameters.
    """
    try:
        before = open_stored(path).model
    except OwnPartError:
        before = open_stored(path, model=model).model
    _check(path, before, model)


def read_initial_run(path: Path, model: FlaxModel) -> Beginning:
    """Reads what a model begins with: the parameters that predictions of the run are made with.

    Args:
      path: As for `check_initial_run`.
      model: As there.

    Raises:
      RunError: As `check_initial_run`, or if the run has no checkpoint.
    """
    try:
        before = load_stored(path).model
    except OwnPartError:
        # Where a part is code of its author's, this model has it, or the arrays do not fit.
        before = load_stored(path, model=model).model
    _check(path, before, model)
    added = count_added(before.config, model.config)
    parameters = add_layers(before.weights, added, before.config)
    if not _draw_alike(before.attention_fn, model.attention_fn):
        return Beginning(parameters, None, True)
    variables = add_layers(before.variables, added, before.config)
    # Layers may have exact attention in one of the models only.
    own = model.state.parameters, model.variables
    places = [
        f"stack.blocks.{i}." for i in range(before.config.num_layers, model.config.num_layers)
    ]
    given, needed = _shapes(parameters, variables), _shapes(*own)
    absent = [name for name, shape in needed.items() if given.get(name) != shape]
    drawn = any(not any(place in name for place in places) for name in absent)
    return Beginning(_take(parameters, own[0]), _take(variables, own[1]), drawn)


def _take(given: Any, own: Any) -> Any:
    """Nested arrays like `own`: those given, and own ones where none of that shape are given."""
    if not isinstance(own, Mapping):
        return given if describe({"": given}) == describe({"": own}) else own
    if not isinstance(given, Mapping):
        return own
    return {name: _take(given[name], part) if name in given else part for name, part in own.items()}


def _check(path: Path, before: FlaxModel, model: FlaxModel) -> None:
    letters, wanted = (model_file.describe_domain(m.domain)["alphabet"] for m in (before, model))
    if letters != wanted:
        raise RunError(
            f"experiment.initial_run: {path} was trained with other tokens, so that its ids mean "
            "other residues: use its settings of make_protein_domain"
        )
    layers, wanted = before.config.num_layers, model.config.num_layers
    added = count_added(before.config, model.config)
    if layers + added != wanted:
        reason = "layers cannot be removed"
        if wanted > layers:
            reason = "with norm_after, none can be added that keep the predictions"
        raise RunError(
            f"experiment.initial_run: {path} has {counted(layers, 'layer')}, and this model "
            f"{wanted}: {reason}; set FlaxModel.num_layers = {layers}"
        )
    stored, expected = (
        jax.eval_shape(m.initialize, jax.random.key(0)).parameters for m in (before, model)
    )
    stored = jax.eval_shape(
        functools.partial(add_layers, number=added, before=before.config), stored
    )
    # Features that are trained belong to the attention function.
    stored, expected = (
        {name: x for name, x in describe(tree).items() if ".projections." not in name}
        for tree in (stored, expected)
    )
    if found := differences(stored, expected):
        raise RunError(
            f"experiment.initial_run: the parameters of {path} do not fit this model: {found}. The "
            "attention function may be another one, and the model may have more layers, but the "
            "other settings that determine the shapes of parameters (FlaxModel.emb_dim, "
            f"num_heads, ...) must be equal: start with --gin_file={path}/config.gin"
        )


def _shapes(parameters: Any, variables: Any) -> dict[str, str]:
    return describe({"parameters": parameters, "variables": variables})


def _draw_alike(before: Any, now: Any) -> bool:
    """Whether two attention functions draw the same, so that one can take what the other drew."""
    before, now = (as_attention_fn(f or make_softmax_attention()) for f in (before, now))
    if isinstance(before, FastAttention) and isinstance(now, FastAttention):
        features = [(f.feature_map, f.calibration, f.moment_decay) for f in (before, now)]
        return features[0] == features[1]
    if type(before) is type(now):
        return before == now
    return not (before.takes.projection or now.takes.projection)
