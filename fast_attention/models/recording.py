"""Looks into attention: the weights and the hash buckets of every layer.

Any attention here is linear in its values, so that attending to the rows of an identity matrix
gives the weights, whatever the mechanism; what is approximated shows as it is used.

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
      weights: float32 ``[B, H, T, S]``, what every query takes from every key.
      buckets: Of LSH attention, else None.
    """

    path: tuple[Any, ...]
    group: int
    weights: Float[Array, "B H T S"]
    buckets: Array | None


def record(model: nnx.Module, *args: Any, **kwargs: Any) -> list[Recording]:
    """Calls a model and keeps the weights of every attention layer. Memory is quadratic in length.

    The model itself is left as it is. A layer that is called twice (tied layers) is recorded
    twice. Keys of memory stand behind those of the sequence. Of attention along an axis of several,
    the other axes are batch. Other layers that mix positions are not recorded.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers inside.
      *args: Of the call, such as tokens.
      **kwargs: Of the call; without dropout.

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
