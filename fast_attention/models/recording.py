"""Attention weights and hash buckets of every layer.

All attention here is linear in the values. So attention with an identity matrix as values gives the
weights of any mechanism, including its approximation error.

Shape letters: B batch, T queries, S keys, H heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.attention.observing import AttentionCall, observed_copy


@dataclasses.dataclass
class Recording:
    """One group of heads of one layer.

    Attributes:
      path: Where the layer is in the model.
      group: Which of its groups of heads.
      weights: float32 ``[B, H, T, S]``, weight of each key for each query.
      buckets: Buckets of LSH attention, otherwise None.
    """

    path: tuple[Any, ...]
    group: int
    weights: Float[Array, "B H T S"]
    buckets: Array | None


def record(model: nnx.Module, *args: Any, **kwargs: Any) -> list[Recording]:
    """Calls a model and records the weights of every attention layer, in quadratic memory.

    The model is not changed. A layer that is called twice (tied layers) is recorded twice. Keys of
    memory come after those of the sequence. For attention along one of several axes, the other axes
    are batch axes. Other layers that mix positions are not recorded.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers inside.
      *args: Arguments of the call, such as tokens.
      **kwargs: Arguments of the call; without dropout.

    Returns:
      One `Recording` per call and group of heads, in the order of the calls.
    """
    kept: list[Recording] = []

    def keep(call: AttentionCall) -> None:
        length = call.key.shape[1]
        one = jnp.eye(length, dtype=call.value.dtype)[None, :, None]
        one = jnp.broadcast_to(one, (*call.value.shape[:-1], length))
        buckets = None
        if call.function.takes.buckets:
            out = call.attend(value=one, options={**call.options, "return_buckets": True})
            weights, buckets = out.out, out.buckets
        else:
            weights = call.attend(value=one)
        weights = jnp.moveaxis(weights.astype(jnp.float32), 1, 2)
        kept.append(Recording(call.path, call.group, weights, buckets))

    observed_copy(model, keep)(*args, **kwargs)
    return kept
