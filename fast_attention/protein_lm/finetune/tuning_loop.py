"""Gradient steps for a property of proteins: mean over residues, linear head, early stopping.

The head begins as the exact solution on the untouched trunk (arXiv:2202.10054), so that training
can only improve on it: what is kept is the epoch of the least validation loss, and that may be
the beginning.

Shape letters: B batch, T length, M width, K outputs, N proteins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fast_attention.protein_lm.finetune import lora
from fast_attention.protein_lm.finetune.linear_head import LinearHead
from fast_attention.protein_lm.finetune.tuning_config import TuningConfig
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.modeling import (
    metrics,
    optimizer,
    schedules,
    token_batches,
    train_state,
)
from fast_attention.protein_lm.modeling.encoding import Encoded, number_rows

# Sequences of this many batches are sorted by length, so that batches hold little padding.
_POOL = 8
_EPOCHS = 5

Trainable = dict[str, Any]


def _make_optimizer(options: optimizer.OptimizerOptions) -> optax.GradientTransformation:
    """The optimiser of rate 1: every update, decay included, is to be multiplied by a rate."""
    return optimizer.create_optimizer(1.0, options)


def make_trunk(model: FlaxModel, config: TuningConfig) -> Trainable:
    """What is trained beside the head: adapters, or all parameters."""
    if config.adapter_rank is None:
        return {"parameters": model.weights}
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return {"adapters": lora.init_adapters(model.weights, config.adapter_rank, key)}


def trunk_parameters(model: FlaxModel, trainable: Trainable, scale: float) -> Any:
    """The parameters that a trained trunk means."""
    if "parameters" in trainable:
        return trainable["parameters"]
    return lora.merge_adapters(model.weights, trainable["adapters"], scale)


def tune(
    model: FlaxModel,
    proteins: Sequence[Encoded],
    targets: np.ndarray,
    weights: np.ndarray,
    head: LinearHead,
    trainable: Trainable,
    config: TuningConfig,
    validate: Callable[[Any, LinearHead], dict[str, float]],
    log: Callable[[dict[str, Any]], None],
) -> tuple[Trainable, LinearHead]:
    """Trains a trunk and a head.

    Args:
      model: Gives structure and the parameters that stay.
      proteins: N, to train on.
      targets: Standardised numbers, float ``[N]``, or classes, int ``[N]``.
      weights: float ``[N]``, how much each counts.
      head: Where the head begins; its ``mean`` and ``scale`` stay.
      trainable: From `make_trunk`.
      config: How long and how fast; the rate falls as a cosine towards 0.
      validate: From parameters and head to metrics; the least ``loss`` is kept.
      log: Takes a row for each epoch.

    Returns:
      The best trunk and head.

    Raises:
      FloatingPointError: If training diverges.
    """
    rows = [model.objective.read(model.domain.vocab, item) for item in proteins]
    per_epoch = -(-len(rows) // config.batch_size)
    total = per_epoch * config.max_epochs
    rate = schedules.create_learning_rate_scheduler(
        "constant * linear_warmup * cosine_decay",
        config.rate,
        warmup_steps=total // 10,
        steps_per_cycle=total + 1,
    )
    options = optimizer.OptimizerOptions(
        weight_decay=config.weight_decay, grad_clip=config.grad_clip
    )
    now = trainable | {"kernel": jnp.asarray(head.kernel), "bias": jnp.asarray(head.bias)}
    opt_state = jax.jit(_make_optimizer(options).init)(now)
    fixed = {
        "parameters": model.weights,
        "variables": model.variables,
        "head": {"mean": head.mean, "scale": head.scale},
        "scale": np.float32(config.scale),
    }
    number = 0

    def current() -> LinearHead:
        return head._replace(kernel=np.asarray(now["kernel"]), bias=np.asarray(now["bias"]))

    values = validate(trunk_parameters(model, now, config.scale), current())
    log({"epoch": 0, "step": 0, "split": "valid", **values})
    best = (values["loss"], now, current())
    waited = 0
    for epoch in range(1, config.max_epochs + 1):
        sums = []
        order = np.random.default_rng([config.seed, _EPOCHS, epoch])
        for batch in _batches(rows, proteins, targets, weights, config.batch_size, order):
            key = jax.random.fold_in(jax.random.key(config.seed), 2 + number)
            now, opt_state, found = _step(
                now,
                opt_state,
                fixed,
                train_state.shard_batch(batch, model.mesh),
                key,
                rate(number),
                graphdef=model.graphdef,
                first=model.objective.first,
                classify=head.kernel.shape[1] > 1,
                options=options,
            )
            sums.append(found)
            number += 1
        sums = jax.device_get(sums)
        metrics.check_finite(sums)
        loss = sum(float(row["loss"]) for row in sums) / sum(float(row["weight"]) for row in sums)
        log({"epoch": epoch, "step": number, "split": "train", "loss": loss})
        values = validate(trunk_parameters(model, now, config.scale), current())
        log({"epoch": epoch, "step": number, "split": "valid", **values})
        waited += 1
        if values["loss"] < best[0]:
            best, waited = (values["loss"], now, current()), 0
        if waited >= config.patience:
            break
    return {name: best[1][name] for name in trainable}, best[2]


@partial(jax.jit, static_argnames=("graphdef", "first", "classify", "options"))
def _step(
    trainable: Trainable,
    opt_state: Any,
    fixed: dict[str, Any],
    batch: dict[str, Any],
    key: jax.Array,
    rate: jax.Array,
    graphdef: Any,
    first: int,
    classify: bool,
    options: optimizer.OptimizerOptions,
) -> tuple[Trainable, Any, Any]:
    """One step. What differs between runs on one model is traced, so that they share a program."""

    def loss(trainable: Trainable) -> tuple[jax.Array, Any]:
        parameters = fixed["parameters"]
        if "parameters" in trainable:
            parameters = trainable["parameters"]
        else:
            parameters = lora.merge_adapters(parameters, trainable["adapters"], fixed["scale"])
        module: Any = nnx.merge(graphdef, parameters, fixed["variables"])
        positions, visible = number_rows(batch["inputs"], batch["lengths"])
        state = module.encode(
            batch["inputs"],
            positions=positions,
            key_mask=visible,
            deterministic=False,
            rngs=nnx.Rngs(key),
        ).astype(jnp.float32)
        place = jnp.arange(state.shape[1])[None]
        own = (place >= first) & (place < (first + batch["residues"])[:, None])
        pooled = jnp.sum(jnp.where(own[..., None], state, 0), axis=1)
        pooled = pooled / jnp.maximum(batch["residues"], 1)[:, None]
        head = LinearHead(**fixed["head"], kernel=trainable["kernel"], bias=trainable["bias"])
        outputs = head(pooled)
        if classify:
            each = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["targets"])
        else:
            each = (outputs[:, 0] - batch["targets"]) ** 2
        weight = jnp.sum(batch["weights"])
        total = jnp.sum(each * batch["weights"])
        return total / jnp.maximum(weight, 1e-9), {"loss": total, "weight": weight}

    gradient, sums = jax.grad(loss, has_aux=True)(trainable)
    updates, opt_state = _make_optimizer(options).update(gradient, opt_state, trainable)
    trainable = jax.tree.map(lambda leaf, update: leaf + rate * update, trainable, updates)
    return trainable, opt_state, sums | {"gradient_norm": optax.tree.norm(gradient)}


def _batches(
    rows: Sequence[np.ndarray],
    proteins: Sequence[Encoded],
    targets: np.ndarray,
    weights: np.ndarray,
    batch_size: int,
    order: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    """Every protein once, in an order of its own; the last batch is filled up with padding."""
    lengths = np.array([len(row) for row in rows])
    widths = [-(-int(lengths.max()) // part) for part in (4, 2, 1)]
    shuffled = order.permutation(len(rows))
    chosen = []
    for first in range(0, len(rows), _POOL * batch_size):
        pool = shuffled[first : first + _POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        chosen += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    for number in order.permutation(len(chosen)):
        members = chosen[number]
        width = next(width for width in widths if width >= lengths[members].max())
        missing = (0, batch_size - len(members))
        yield {
            "inputs": token_batches.fill([rows[i] for i in members], (batch_size, width)),
            "lengths": np.pad(lengths[members], missing).astype(np.int32),
            "residues": np.pad([len(proteins[i].residues) for i in members], missing).astype(
                np.int32
            ),
            "targets": np.pad(targets[members], missing),
            "weights": np.pad(weights[members], missing).astype(np.float32),
        }
