"""Attention transfer: linear attention is trained to reproduce exact attention, per layer.

A model with exact attention is called. The queries, keys and values of every layer are passed to
the same layer of a model with another attention function, and the outputs of the heads are
compared. Errors of earlier layers do not contribute, so all layers are trained at once, on any
input and without labels (LoLCATs, arXiv:2410.10254, section 3.1; Hedgehog, arXiv:2402.04347,
section 4.2).

Shape letters: B batch, T length, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float
from fast_attention.layers.attention.config import HeadGroup
from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.attention.observing import AttentionCall, observed_copy
from fast_attention.layers.attention.stored_projections import TrainedTuning, held_projection
from fast_attention.layers.attention.switch import with_attention

Model = TypeVar("Model", bound=nnx.Module)


class OutputErrors(NamedTuple):
    """Sums over positions without padding, for the heads of one group of a layer.

    Attributes:
      error: ``[H]``, sum of ``|out - exact|^2``.
      size: ``[H]``, sum of ``|exact|^2``.
    """

    error: Array
    size: Array


def output_errors(
    exact: nnx.Module, linear: nnx.Module, *args: Any, **kwargs: Any
) -> dict[str, OutputErrors]:
    """Compares the attention of two models on the hidden states of the first.

    Args:
      exact: Any module with `MultiHeadAttention` layers inside; it is not changed.
      linear: A module with the same layers, such as a result of `with_attention`.
      *args: Arguments of a call of `exact`, such as tokens.
      **kwargs: Arguments of that call, such as ``key_mask``; without it padding would count.

    Returns:
      Sums by `AttentionCall.name`, in the order of the calls, for groups of heads whose attention
      function differs. Differentiable in the features of `linear`; the targets are constants.

    Raises:
      ValueError: If no attention function differs.
    """
    layers = {
        path: module
        for path, module in nnx.iter_modules(linear)
        if isinstance(module, MultiHeadAttention)
    }
    found: dict[str, OutputErrors] = {}

    def judge(call: AttentionCall) -> None:
        layer = layers[call.path]
        function = layer.config.groups[call.group].attention_fn
        if function == call.function:
            return
        held = layer.projections[call.group]
        options = {} if held is None else {"projection": held_projection(held)}
        three = (call.query, call.key, call.value)
        query, key, value = (
            jax.lax.stop_gradient(x.astype(at_least_float32(x.dtype))) for x in three
        )
        call = call._replace(query=query, key=key, value=value)
        target = jax.lax.stop_gradient(call.attend())
        difference = call.attend(function=function, options=options) - target
        mask = call.visible.query_mask
        counted = jnp.ones(query.shape[:2], bool) if mask is None else mask.astype(bool)
        error, size = (
            jnp.sum(jnp.where(counted[..., None, None], x, 0) ** 2, axis=(0, 1, 3))
            for x in (difference, target)
        )
        before = found.get(call.name, OutputErrors(jnp.zeros_like(error), jnp.zeros_like(size)))
        found[call.name] = OutputErrors(before.error + error, before.size + size)

    observed_copy(exact, judge)(*args, **kwargs)
    if not found:
        raise ValueError(
            "The two models have the same attention functions: give a model and "
            "with_attention(model, attention_fn, rngs)."
        )
    return found


def transfer_loss(errors: Mapping[str, OutputErrors]) -> Float[Array, ""]:
    """The mean over heads of squared errors, relative to the mean square of exact outputs."""
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.mean(jnp.concatenate([x.error / jnp.maximum(x.size, tiny) for x in errors.values()]))


def linearize(
    model: Model,
    attention_fn: Callable[..., Any],
    batches: Iterable[Mapping[str, Any]],
    optimizer: optax.GradientTransformation,
    rngs: nnx.Rngs,
    *,
    where: Callable[[HeadGroup], bool] | None = None,
) -> Model:
    """Returns a model with another attention function, trained to reproduce the original one.

    The features of `attention_fn` are trained with `transfer_loss`; all other parameters equal
    those of `model`. Fine-tune the result if needed::

        hedgehog = make_fast_softmax_attention(nb_features=128, estimator="hedgehog")
        batches = ({"tokens": x, "key_mask": x > 0} for x in tokens)
        linear = layers.linearize(transformer, hedgehog, batches, optax.adam(1e-2), nnx.Rngs(0))

    Args:
      model: Any module with `MultiHeadAttention` layers inside; it is not changed.
      attention_fn: A function with learned features: ``estimator="hedgehog"``, ``"darkformer"``, or
        ``calibration="trained"``.
      batches: Keyword arguments of calls of `model`, one step each; equal shapes share a compiled
        program.
      optimizer: Optimizer of the features.
      rngs: Source of the random projections.
      where: As for `with_attention`: selects groups of heads to change; None changes all.

    Raises:
      ValueError: As `with_attention`, or if the function has no learned features.
    """
    linear = with_attention(model, attention_fn, rngs, where=where)
    graphdef, learned, rest = nnx.split(linear, TrainedTuning, ...)
    if not jax.tree.leaves(learned):
        raise ValueError(
            "attention_fn has no learned features: use estimator='hedgehog' or 'darkformer', or "
            "calibration='trained', or use with_attention only."
        )
    exact = nnx.split(model)

    @jax.jit
    def step(learned: Any, state: Any, rest: Any, exact_state: Any, batch: Any) -> Any:
        def loss(learned: Any) -> Array:
            two = nnx.merge(exact[0], exact_state), nnx.merge(graphdef, learned, rest)
            return transfer_loss(output_errors(*two, **batch))

        updates, state = optimizer.update(jax.grad(loss)(learned), state, learned)
        return optax.apply_updates(learned, updates), state

    state = optimizer.init(learned)
    for batch in batches:
        learned, state = step(learned, state, rest, exact[1], dict(batch))
    nnx.update(linear, learned)
    return linear
