"""Training steps without a run folder, for `FlaxModel.fit`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax

from fast_attention.protein_lm.modeling import metrics, train_state

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel


def take_steps(model: BuiltModel, found: Iterable[train_state.Batch]) -> dict[str, Any]:
    """Takes a training step with each batch.

    Args:
      model: Its state is updated.
      found: Batches of the form of `data.make_dataset`.

    Returns:
      ``last`` and ``average`` metrics of the batches, ``steps`` and ``seconds``.

    Raises:
      FloatingPointError: If the loss or the gradient is not finite.
      ValueError: If there is no batch.
    """
    began = time.perf_counter()
    sums = take_each(model, found)
    if not sums:
        raise ValueError("no step was taken: there is no batch, or epochs or max_steps is 0")
    return {
        "last": metrics.combine_metrics(sums[-1:]),
        "average": metrics.combine_metrics(sums),
        "steps": len(sums),
        "seconds": time.perf_counter() - began,
    }


def take_each(model: BuiltModel, found: Iterable[train_state.Batch]) -> list[metrics.Sums]:
    """Takes a training step with each batch, and returns `metrics.token_sums` of each.

    Raises:
      FloatingPointError: If the loss or the gradient is not finite.
    """
    sums = []
    for batch in found:
        model.state, batch_sums = model.train_step(
            model.state, train_state.shard_batch(batch, model.mesh)
        )
        sums.append(batch_sums)
    sums = jax.device_get(sums)
    metrics.check_finite(sums)
    return sums
