"""The compiled steps: attention transfer, and fine-tuning by two losses.

Shape letters: B batch, T length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fast_attention.arrays.types import Array
from fast_attention.layers.attention.transfer import output_errors, transfer_loss
from fast_attention.protein_lm.finetune import lora
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.linearize.config import LinearizeConfig
from fast_attention.protein_lm.modeling import metrics
from fast_attention.protein_lm.modeling.optimizer import OptimizerOptions, create_optimizer
from fast_attention.protein_lm.modeling.train_state import Batch

FEATURES = "projections"
"""What layers call the parameters of their attention functions."""

_WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""

Step = Callable[[Any, Any, Batch, Array], tuple[Any, Any, Array]]


def make_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW without decay; the rate rises, then falls as a cosine towards 0."""
    warmup = int(_WARMUP * steps)
    schedule = optax.warmup_cosine_decay_schedule(
        rate / max(1, warmup), rate, warmup, max(steps, warmup + 1)
    )
    return create_optimizer(schedule, OptimizerOptions(weight_decay=0.0, grad_clip=1.0))


def features_of(parameters: Any) -> dict[str, Array]:
    """The parameters of attention functions by their path; empty where there are none."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    named = ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    return {name: leaf for name, leaf in named if f"'{FEATURES}'" in name}


def with_features(parameters: Any, features: Mapping[str, Array]) -> Any:
    """The same parameters with others of their attention functions."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: features.get(jax.tree_util.keystr(path), leaf), parameters
    )


def parameters_of(trainable: Mapping[str, Any], parameters: Any, scale: float) -> Any:
    """The parameters that a trained part means.

    Args:
      trainable: ``parameters`` (all of them), or ``features`` with or without ``adapters``.
      parameters: Of the model, for what is not trained.
      scale: Of adapters.
    """
    if "parameters" in trainable:
        return trainable["parameters"]
    if "adapters" in trainable:
        parameters = lora.merge_adapters(parameters, trainable["adapters"], scale)
    return with_features(parameters, trainable["features"])


def visible(batch: Batch) -> dict[str, Any]:
    """Keywords of a call of a model, for a batch whose rows hold one protein each."""
    return {
        "positions": jnp.asarray(batch["positions"]),
        "key_mask": jnp.asarray(batch["segment_ids"]) > 0,
    }


def make_errors(exact: FlaxModel, linear: FlaxModel) -> Callable[..., Any]:
    """Makes the function ``(parameters of linear, batch) -> output_errors``, not compiled."""

    def errors(parameters: Any, fixed: Any, batch: Batch) -> Any:
        teacher = nnx.merge(exact.graphdef, *fixed["exact"])
        student = nnx.merge(linear.graphdef, parameters, fixed["variables"])
        return output_errors(teacher, student, batch["inputs"], **visible(batch))

    return errors


def make_transfer_step(
    exact: FlaxModel, linear: FlaxModel, optimizer: optax.GradientTransformation
) -> Step:
    """Makes the step that trains features alone, ``(trainable, opt_state, batch, key)``."""
    errors = make_errors(exact, linear)

    def loss(parameters: Any, fixed: Any, batch: Batch, key: Array) -> Array:
        del key
        return transfer_loss(errors(parameters, fixed, batch))

    return _make_step(loss, exact, linear, optimizer)


def make_finetune_step(
    exact: FlaxModel,
    linear: FlaxModel,
    optimizer: optax.GradientTransformation,
    config: LinearizeConfig,
) -> Step:
    """Makes the step by the model's loss and the divergence from the exact model.

    The loss is the mean over the predicted tokens of ``-log p(target) + w KL(exact || p)``
    with ``w = kl_weight``.
    """

    def loss(parameters: Any, fixed: Any, batch: Batch, key: Array) -> Array:
        student: Any = nnx.merge(linear.graphdef, parameters, fixed["variables"])
        teacher: Any = nnx.merge(exact.graphdef, *fixed["exact"])
        told = visible(batch)
        logits = student(batch["inputs"], **told, deterministic=False, rngs=nnx.Rngs(key))
        sums = metrics.token_sums(logits, batch["targets"], batch["weights"])
        target = teacher(batch["inputs"], **told, deterministic=True)
        exact_log, log = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (target, logits))
        exact_log = jax.lax.stop_gradient(exact_log)
        each = jnp.sum(jnp.exp(exact_log) * (exact_log - log), axis=-1)
        divergence = jnp.sum(each * batch["weights"])
        total = sums["loss"] + config.kl_weight * divergence
        return total / jnp.maximum(sums["denominator"], 1.0)

    return _make_step(loss, exact, linear, optimizer)


def _make_step(
    loss: Callable[[Any, Any, Batch, Array], Array],
    exact: FlaxModel,
    linear: FlaxModel,
    optimizer: optax.GradientTransformation,
) -> Step:
    """Makes the step that lowers ``loss(parameters of linear, fixed_arrays, batch, key)``."""
    fixed, own = fixed_arrays(exact, linear), linear.weights

    @jax.jit
    def step(trainable: Any, opt_state: Any, fixed: Any, own: Any, batch: Batch, key: Array) -> Any:
        def of_trainable(trainable: Any) -> Array:
            return loss(parameters_of(trainable, own, 1.0), fixed, batch, key)

        value, gradient = jax.value_and_grad(of_trainable)(trainable)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return lambda trainable, opt_state, batch, key: step(
        trainable, opt_state, fixed, own, batch, key
    )


def fixed_arrays(exact: FlaxModel, linear: FlaxModel) -> dict[str, Any]:
    """Arrays that no step changes."""
    return {
        "exact": (exact.weights, exact.variables),
        "variables": linear.variables,
    }
