"""The structure of a model and the shapes of its arrays, described once for equal models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx
from jax.sharding import Mesh

from fast_attention.models.on_mesh import lay_on_mesh
from fast_attention.protein_lm.modeling import train_state
from fast_attention.protein_lm.modeling.made_once import made_once


@dataclasses.dataclass(frozen=True)
class Build:
    """Makes the Transformer of a model; equal where class, shape and attention function are."""

    model_cls: Callable[..., nnx.Module]
    config: Any
    attention_fn: Callable[..., Any] | None

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes it with these random numbers."""
        return self.model_cls(self.config, self.attention_fn, rngs=rngs)


@made_once
def describe_model(
    build: Build,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    averaged: bool,
    settings: tuple[Any, ...],
) -> tuple[Any, train_state.TrainState]:
    """Returns the structure of a model and the shapes of its state; makes no array.

    Args:
      build: Makes the model.
      optimizer: Updates the parameters.
      mesh: On which the state is placed.
      averaged: Whether the state has a moving average of the parameters.
      settings: Of JAX, on which dtypes depend: part of what is made once.
    """
    del settings
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    lay_on_mesh(abstract, mesh)
    graphdef, parameters, variables = train_state.split_model(abstract)
    state = train_state.abstract_state(parameters, variables, optimizer, mesh, averaged=averaged)
    return graphdef, state
