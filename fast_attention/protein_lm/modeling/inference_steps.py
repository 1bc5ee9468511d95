"""The compiled functions from a batch to log-probabilities and to representations.

Letters: B batch, T length, L layers, M width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.protein_lm.modeling.encoding import number_rows
from fast_attention.protein_lm.modeling.made_once import made_once
from fast_attention.protein_lm.modeling.objectives import Objective

Layer = int | Literal["last"]


@made_once
def make_residue_step(graphdef: Any) -> Callable[..., jax.Array]:
    """Makes the jitted function from a batch of questions to log-probabilities, float32.

    Args:
      graphdef: Structure of the model.

    Returns:
      ``(parameters, variables, inputs [B, T], targets [B, T], places, lengths [B]) -> [B, T]`` with
      ``places`` None, or with ``targets [B, 1]`` and ``places [B]``, see `Question`.
    """

    def log_probabilities(
        parameters: Any, variables: Any, inputs: Any, targets: Any, places: Any, lengths: Any
    ) -> jax.Array:
        model = nnx.merge(graphdef, parameters, variables)
        positions, visible = number_rows(inputs, lengths)
        logits = model(inputs, positions=positions, key_mask=visible, deterministic=True)
        if places is not None:
            logits = jnp.take_along_axis(logits, places[:, None, None], axis=1)
        found = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]

    return jax.jit(log_probabilities)


@made_once
def make_embedding_step(graphdef: Any, objective: Objective) -> Callable[..., jax.Array]:
    """Makes the jitted function from a batch to representations.

    Args:
      graphdef: Structure of the model.
      objective: Says where the first residue stands.

    Returns:
      ``(parameters, variables, *, inputs [B, T], lengths [B] of all tokens, residues [B], layers,
      pool, dtype)`` to ``[L, B, M]``, or ``[L, B, T, M]`` without a pool.
    """
    first = objective.first

    def embed(
        parameters: Any,
        variables: Any,
        *,
        inputs: Any,
        lengths: Any,
        residues: Any,
        layers: tuple[Layer, ...],
        pool: str | None,
        dtype: str,
    ) -> jax.Array:
        model = nnx.merge(graphdef, parameters, variables)
        positions, visible = number_rows(inputs, lengths)
        found = model.hidden_states(inputs, layers, positions=positions, key_mask=visible)
        place = jnp.arange(inputs.shape[1])[None]
        own = (place >= first) & (place < (first + residues)[:, None])
        last = objective.last(residues)
        states = [_pool(state.astype(jnp.float32), own, residues, last, pool) for state in found]
        return jnp.stack(states).astype(dtype)

    return jax.jit(embed, static_argnames=("layers", "pool", "dtype"))


def _pool(
    state: jax.Array, own: jax.Array, residues: jax.Array, last: jax.Array, pool: str | None
) -> jax.Array:
    """Pools ``[B, T, M]`` over the positions where `own` ``[B, T]`` is true."""
    if pool is None:
        return state
    if pool == "bos":
        return state[:, 0]
    if pool == "eos":
        # The end token of a masked model, or the last residue behind a begin token.
        return jnp.take_along_axis(state, last[:, None, None], axis=1)[:, 0]
    if pool == "max":
        return jnp.max(jnp.where(own[..., None], state, -jnp.inf), axis=1)
    total = jnp.sum(jnp.where(own[..., None], state, 0), axis=1)
    return total if pool == "sum" else total / jnp.maximum(residues, 1)[:, None]
