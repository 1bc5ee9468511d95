"""The exchange of an attention function: what a model keeps, what its features begin with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention import layers
from fast_attention.protein_lm.modeling.train_state import Batch, TrainState, split_model, weights


def keep_features(state: TrainState, parameters: Any) -> tuple[Any, Any]:
    """Arrays of a model whose attention function is another one than that of `parameters`.

    Attention functions have no parameters, unless their random features are trained: then layers
    hold these among their ``projections``.

    Args:
      state: Of the model, with what its own attention function drew.
      parameters: Of a model that is alike but for its attention function.

    Returns:
      Parameters, those of attention functions from `state` and all others as given, and variables,
      those of `state`.
    """

    def choose(own: Any, given: Any) -> Any:
        if not isinstance(own, Mapping):
            return given
        return {
            name: part if name == "projections" else choose(part, given[name])
            for name, part in own.items()
        }

    return choose(state.parameters, parameters), state.variables


def calibrate_state(graphdef: Any, state: TrainState, batch: Batch) -> TrainState:
    """The same state with random features fitted to a batch, see `layers.calibrate`.

    Args:
      graphdef: Structure of the model.
      state: Step, optimiser and average stay as they are, and so do parameters, but for those of
        features that are trained.
      batch: Of the form of `data.make_dataset`.

    Raises:
      ValueError: If the attention function has nothing to calibrate.
    """
    fitted, variables = _fit(graphdef, weights(state), state.variables, dict(batch))
    with_features = TrainState(**vars(state) | {"parameters": fitted, "variables": variables})
    trees = {"parameters": state.parameters, "average": state.average}
    changed = {
        name: keep_features(with_features, tree)[0]
        for name, tree in trees.items()
        if tree is not None
    }
    if state.average is not None:
        # A state is donated: none of its buffers may serve twice.
        changed["average"] = jax.tree.map(jnp.copy, changed["average"])
    return dataclasses.replace(state, variables=variables, **changed)


@functools.partial(jax.jit, static_argnames="graphdef")
def _fit(graphdef: Any, parameters: Any, variables: Any, batch: Batch) -> tuple[Any, Any]:
    model = nnx.merge(graphdef, parameters, variables)
    segment_ids = jnp.asarray(batch["segment_ids"])
    # The mask keeps padding out of what is measured.
    layers.calibrate(
        model,
        batch["inputs"],
        positions=batch["positions"],
        segment_ids=segment_ids,
        key_mask=segment_ids > 0,
    )
    _, parameters, variables = split_model(model)
    return parameters, variables
