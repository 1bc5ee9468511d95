"""Looks into attention: the weights and the hash buckets of every layer.

Any attention here is linear in its values, so that attending to the rows of an identity matrix
gives the weights, whatever the mechanism; what is approximated shows as it is used.

Shape letters: B batch, T queries, S keys, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array, Float
from fast_attention.layers.multi_head import MultiHeadAttention


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
    twice.

    Args:
      model: Any module with `MultiHeadAttention` layers inside.
      *args: Of the call, such as tokens.
      **kwargs: Of the call; without dropout.

    Returns:
      One `Recording` per call and group of heads, in the order of the calls.
    """
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, state)
    kept: list[Recording] = []
    for path, module in nnx.iter_modules(copy):
        if isinstance(module, MultiHeadAttention):
            groups = tuple(
                dataclasses.replace(
                    group, attention_fn=_Recorded(group.attention_fn, path, index, kept)
                )
                for index, group in enumerate(module.config.groups)
            )
            module.config = dataclasses.replace(module.config, groups=groups)
    copy(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return kept


class _Recorded:
    """An attention function that also keeps its weights."""

    def __init__(
        self, function: Callable[..., Any], path: tuple[Any, ...], group: int, kept: list[Recording]
    ):
        self.function = function
        self.__signature__ = inspect.signature(function)
        self.path, self.group, self.kept = path, group, kept

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        out = self.function(query, key, value, **options)
        buckets = out.buckets if options.get("return_buckets") else None
        if buckets is not None:
            options |= {"buckets": buckets}
        length = key.shape[1]
        one = jnp.eye(length, dtype=value.dtype)[None, :, None]
        one = jnp.broadcast_to(one, (*value.shape[:-1], length))
        weights = self.function(query, key, one, **options)
        weights = weights.out if options.get("return_buckets") else weights
        weights = jnp.moveaxis(weights.astype(jnp.float32), 1, 2)
        self.kept.append(Recording(self.path, self.group, weights, buckets))
        return out
