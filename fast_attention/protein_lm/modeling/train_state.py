"""What training carries from step to step, and the pure, jitted functions that advance it.

Shape letters: B batch, T length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fast_attention.mesh.meshes import batch_spec
from fast_attention.models.placement import parameter_shardings
from fast_attention.protein_lm.distributed import process_arrays
from fast_attention.protein_lm.modeling import metrics
from fast_attention.protein_lm.modeling.feature_upkeep import keep_up_features
from fast_attention.protein_lm.modeling.made_once import made_once

Batch = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step reads and writes: arrays, or their shapes and dtypes.

    Attributes:
      step: int32 scalar, the number of steps taken.
      parameters: Nested dict of what the optimiser changes.
      variables: Nested dict of the model's other arrays, attention projections among them.
      opt_state: The optimiser's own.
      key: Root of all randomness; step s uses ``fold_in(key, s)``.
      average: Moving average of the parameters, of the same nest; None where none is kept.
    """

    step: Any
    parameters: Any
    variables: Any
    opt_state: Any
    key: Any
    average: Any = None


def weights(state: TrainState) -> Any:
    """What predictions are made with: the averaged parameters, or the parameters themselves."""
    return state.parameters if state.average is None else state.average


def split_model(model: nnx.Module) -> tuple[Any, Any, Any]:
    """Splits a module into its structure and two nested dicts, parameters and the rest."""
    graphdef, parameters, variables = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(parameters), nnx.to_pure_dict(variables)


def make_state(
    parameters: Any,
    variables: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    averaged: bool = False,
) -> TrainState:
    """The state of step 0 for given arrays of a model, with an average of them if `averaged`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        variables=variables,
        opt_state=optimizer.init(parameters),
        key=key,
        # A state is donated: none of its buffers may serve twice.
        average=jax.tree.map(jnp.copy, parameters) if averaged else None,
    )


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Where the arrays of a `TrainState` lie, hashable.

    Attributes:
      leaves: A sharding for each array.
      structure: Of the state.
    """

    leaves: tuple[NamedSharding, ...]
    structure: Any

    @classmethod
    def of(cls, abstract: TrainState) -> Shardings:
        """Those of `abstract_state`."""
        leaves, structure = jax.tree.flatten(abstract)
        return cls(tuple(leaf.sharding for leaf in leaves), structure)

    @property
    def state(self) -> TrainState:
        """A state of shardings."""
        return jax.tree.unflatten(self.structure, self.leaves)


@made_once
def make_initializer(
    build: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    averaged: bool = False,
    shardings: Shardings | None = None,
) -> Callable[[jax.Array], TrainState]:
    """Makes the jitted function from a random key to the state of step 0.

    Args:
      build: Makes the model.
      optimizer: Whose state starts empty.
      averaged: Whether the state has a moving average of the parameters.
      shardings: No device ever holds more than its part.
    """

    @partial(jax.jit, out_shardings=None if shardings is None else shardings.state)
    def initialize(key: jax.Array) -> TrainState:
        model_key, train_key = jax.random.split(key)
        _, parameters, variables = split_model(build(nnx.Rngs(model_key)))
        return make_state(parameters, variables, optimizer, train_key, averaged=averaged)

    return initialize


@made_once
def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    shardings: Shardings | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, metrics.Sums]]:
    """Makes the jitted step ``(state, batch) -> (state, sums)``.

    The loss is the mean cross-entropy over the batch's weights. The state passed in is donated:
    its buffers are reused and must not be read again. Random features are redrawn and recalibrated
    after the steps that the model's stacks say, see `keep_up_features`.

    Where the loss or the gradient is infinite or not a number, the step is counted, and all else
    of the state stays as it was: nothing of such a step enters the parameters, the moments of the
    optimiser or the average. ``sums`` report it.

    With ``ema_decay`` = d, the average a of parameters p becomes c a + (1 - c) p after step t (from
    0 on) with c = min(d, (1 + t) / (10 + t)), so that it does not stick to where training began.

    Args:
      graphdef: Structure of the model.
      optimizer: Updates the parameters.
      ema_decay: d of the moving average; None keeps none.
      shardings: Of the state, which leaves a step as it came; None leaves that to the compiler.

    Returns:
      A function whose batch holds ``inputs``, ``targets``, ``weights``, ``segment_ids`` and
      ``positions``, each [B, T], and whose second result is `metrics.token_sums` with
      ``gradient_norm`` (before clipping) and ``tokens`` (int32, without padding) added.

    Raises:
      ValueError: If `ema_decay` is out of its range.
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), or None for no average; got {ema_decay}")

    def loss(parameters: Any, state: TrainState, batch: Batch) -> Any:
        model = nnx.merge(graphdef, parameters, state.variables)
        logits = model(
            batch["inputs"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            deterministic=False,
            rngs=nnx.Rngs(jax.random.fold_in(state.key, state.step)),
        )
        sums = metrics.token_sums(logits, batch["targets"], batch["weights"])
        _, _, variables = split_model(model)
        return sums["loss"] / jnp.maximum(sums["denominator"], 1.0), (sums, variables)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, metrics.Sums]:
        gradient, (sums, variables) = jax.grad(loss, has_aux=True)(state.parameters, state, batch)
        norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        average = state.average
        if ema_decay is not None:
            keep = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(
                lambda old, new: (keep * old + (1 - keep) * new).astype(old.dtype),
                state.average,
                parameters,
            )
        step_key = jax.random.fold_in(state.key, state.step)
        variables = keep_up_features(graphdef, parameters, variables, step_key, state.step + 1)
        sound = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        before = (state.parameters, state.variables, state.opt_state, state.average)
        after = (parameters, variables, opt_state, average)
        parameters, variables, opt_state, average = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), after, before
        )
        new_state = TrainState(state.step + 1, parameters, variables, opt_state, state.key, average)
        tokens = jnp.count_nonzero(batch["segment_ids"])
        return new_state, sums | {"gradient_norm": norm, "tokens": tokens}

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    where = shardings.state
    return jax.jit(step, donate_argnums=0, out_shardings=(where, where.step))


def make_forward(graphdef: Any) -> Callable[..., jax.Array]:
    """Makes the deterministic ``(parameters, variables, batch, packed) -> logits [B, T, V]``.

    With ``packed=False`` a row holds one sequence and padding at its end, so that padding is a
    key mask, which costs less than segments.
    """

    def forward(parameters: Any, variables: Any, batch: Batch, packed: bool) -> jax.Array:
        model = nnx.merge(graphdef, parameters, variables)
        segment_ids = jnp.asarray(batch["segment_ids"])
        return model(
            batch["inputs"],
            positions=batch["positions"],
            segment_ids=segment_ids if packed else None,
            key_mask=None if packed else segment_ids > 0,
            deterministic=True,
        )

    return forward


@made_once
def make_logits(graphdef: Any) -> Callable[..., jax.Array]:
    """Makes the jitted `make_forward`."""
    return jax.jit(make_forward(graphdef), static_argnames="packed")


@made_once
def make_eval_step(graphdef: Any) -> Callable[..., metrics.Sums]:
    """Makes the jitted ``(parameters, variables, batch, packed) -> metrics.token_sums``."""
    forward = make_forward(graphdef)

    def step(parameters: Any, variables: Any, batch: Batch, packed: bool) -> metrics.Sums:
        logits = forward(parameters, variables, batch, packed)
        return metrics.token_sums(logits, batch["targets"], batch["weights"])

    return jax.jit(step, static_argnames="packed")


@partial(jax.jit, static_argnames=("graphdef", "packed"))
def row_sums(
    graphdef: Any, parameters: Any, variables: Any, batch: Batch, packed: bool
) -> metrics.Sums:
    """As `make_eval_step`, with sums ``[B]`` of each row."""
    logits = make_forward(graphdef)(parameters, variables, batch, packed)
    return metrics.token_sums(logits, batch["targets"], batch["weights"], axis=1)


def is_packed(batch: Batch) -> bool:
    """Whether a row of a host batch holds more than one sequence."""
    return int(np.max(np.asarray(batch["segment_ids"]), initial=0)) > 1


def abstract_state(
    parameters: Any,
    variables: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    averaged: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state of a model, as `jax.ShapeDtypeStruct`.

    Args:
      parameters: Arrays, or their shapes.
      variables: The same of the other arrays.
      optimizer: Updates the parameters.
      mesh: On which the state is placed.
      averaged: Whether the state has a moving average of the parameters.
    """

    def make(parameters: Any, variables: Any) -> TrainState:
        return make_state(parameters, variables, optimizer, jax.random.key(0), averaged=averaged)

    state = jax.eval_shape(make, parameters, variables)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        state_shardings(state, mesh),
    )


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where the arrays of a state lie.

    Moments and averages lie as their parameters (`placement.parameter_spec`); every device holds
    all of the rest.

    Args:
      state: Arrays, or their shapes.
      mesh: From `meshes.make_mesh`.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=whole,
        parameters=parameter_shardings(state.parameters, mesh),
        variables=jax.tree.map(lambda _: whole, state.variables),
        opt_state=parameter_shardings(state.opt_state, mesh),
        key=whole,
        average=parameter_shardings(state.average, mesh),
    )


def shard_batch(
    batch: Batch, mesh: Mesh, rows: process_arrays.Rows | None = None
) -> dict[str, jax.Array]:
    """Divides a batch over the devices, or copies it where they do not divide it.

    See `meshes.batch_spec`.

    Args:
      batch: Arrays on the host.
      mesh: The devices.
      rows: Which rows of the batch of all processes `batch` holds; None stands for all.
    """
    total = len(batch["inputs"]) if rows is None else rows.total
    shardings = {
        name: NamedSharding(mesh, batch_spec(mesh, (total, *np.shape(value)[1:])))
        for name, value in batch.items()
    }
    return process_arrays.place(batch, shardings, rows)
