"""A training step, with gradients accumulated over parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes

Loss = Callable[[Any, Any, nnx.Rngs | None], tuple[Array, Array]]
"""``loss(model, batch, rngs) -> (mean, count)``: a mean, and the number of averaged items."""


def make_train_step(
    loss: Loss, *, accumulate: int = 1
) -> Callable[[nnx.Module, nnx.Optimizer, Any, nnx.Rngs | None], Float[Array, ""]]:
    """Returns a compiled training step.

    The batch is split into `accumulate` equal parts, computed one after another with the memory of
    one. The gradient is that of the whole batch, also if parts have different amounts of padding.

    Args:
      loss: See `Loss`, for example ``lambda model, tokens, rngs: next_token_loss(model, tokens,
        ignore_index=0, deterministic=False, rngs=rngs)``.
      accumulate: Number of parts; must divide the leading axis of the arrays of a batch.

    Returns:
      ``step(model, optimizer, batch, rngs) -> loss``, which updates the first two in place; `rngs`
      is the source of dropout, and may be None without dropout. The optimiser is
      ``nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)``.

    Raises:
      ValueError: If `accumulate` is not positive; the step raises it if `accumulate` does not
        divide the batch.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}.")

    @nnx.jit
    @modules_run_on_auto_axes
    def step(
        model: nnx.Module, optimizer: nnx.Optimizer, batch: Any, rngs: nnx.Rngs | None
    ) -> Array:
        graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)

        def weighted(parameters: Any, rest: Any, part: Any, key: Array | None) -> Any:
            copy = nnx.merge(graphdef, parameters, rest, copy=True)  # Statistics will change.
            mean, count = loss(copy, part, None if key is None else nnx.Rngs(key))
            return mean * count, (count, nnx.state(copy, nnx.BatchStat))

        def add(total: Any, part_and_key: Any) -> Any:
            rest, sums = total
            (summed, (count, statistics)), gradient = jax.value_and_grad(weighted, has_aux=True)(
                parameters, rest, *part_and_key
            )
            sums = jax.tree.map(jnp.add, sums, (summed, count.astype(jnp.float32), gradient))
            return (_replaced(rest, statistics), sums), None

        keys = None if rngs is None else jax.random.split(rngs.dropout(), accumulate)
        zero = jnp.zeros((), jnp.float32)
        first = (rest, (zero, zero, jax.tree.map(jnp.zeros_like, parameters)))
        parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
        (rest, (summed, count, gradient)), _ = lax.scan(add, first, (parts, keys))
        count = jnp.maximum(count, 1)
        nnx.update(model, rest)
        optimizer.update(model, jax.tree.map(lambda x: (x / count).astype(x.dtype), gradient))
        return summed / count

    return step


def _parts(x: Array, number: int) -> Array:
    if len(x) % number:
        raise ValueError(
            f"accumulate={number} must divide the batch, whose leading axis is {len(x)}."
        )
    return x.reshape(number, len(x) // number, *x.shape[1:])


def _replaced(state: Any, update: Any) -> Any:
    """The state with other statistics."""
    return nnx.merge_state(state, update) if jax.tree.leaves(update) else state
