"""Weighted sums over tokens: cross-entropy, accuracy, and how they combine over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Float, Int

Sums = dict[str, Any]

_SUMS = {"accuracy": "correct"}


def token_sums(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    axis: int | None = None,
) -> Sums:
    """Sums the cross-entropy and the hits of the most probable token.

    Args:
      logits: Unnormalised log-probabilities over the whole vocabulary, special tokens included.
      targets: Ids to predict.
      weights: What each position counts; 0 leaves it out, and a negative weight asks for less
        likelihood.
      axis: Summed over; None is both, 1 gives sums ``[B]`` of each row.

    Returns:
      float32 scalars, or ``[B]``: ``loss`` (nats), ``correct`` and ``denominator`` (the sum of the
      weights without their signs), each a sum, so that batches combine by addition.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    hits = jnp.argmax(logits, axis=-1) == targets
    return {
        "loss": -jnp.sum(chosen * weights, axis),
        "correct": jnp.sum(hits * weights, axis),
        "denominator": jnp.sum(jnp.abs(weights), axis),
    }


def combine_metrics(sums: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means per token over several batches.

    Args:
      sums: Results of `token_sums` or of `per_batch`.

    Returns:
      ``loss``, ``perplexity`` = exp(loss), ``accuracy`` and ``denominator``, Python floats.

    Raises:
      ValueError: If no token was counted.
    """
    rows = [{_SUMS.get(name, name): np.sum(value) for name, value in row.items()} for row in sums]
    total = {name: math.fsum(row[name] for row in rows) for name in (rows[0] if rows else ())}
    if not total.get("denominator"):
        raise ValueError("no token to average over: every weight is zero, or there is no batch")
    loss = total["loss"] / total["denominator"]
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "accuracy": total["correct"] / total["denominator"],
        "denominator": total["denominator"],
    }


def per_batch(sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The sums of one batch under the names of Google's protein_lm, float32 ``[1]``.

    Args:
      sums: Result of `token_sums`.
    """
    names = {"loss": "loss", "correct": "accuracy", "denominator": "denominator"}
    return {new: np.reshape(np.float32(sums[old]), 1) for old, new in names.items()}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that exceeds a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_finite(sums: Iterable[Mapping[str, Any]]) -> None:
    """Stops training that has diverged.

    Args:
      sums: Results of `token_sums`, with ``gradient_norm`` where there is one.

    Raises:
      FloatingPointError: If a figure is infinite or not a number.
    """
    for row in sums:
        for name, value in row.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name.replace('_', ' ')} is {float(value)}: training has diverged; "
                    "lower the learning rate, lengthen the warm-up or set grad_clip"
                )
