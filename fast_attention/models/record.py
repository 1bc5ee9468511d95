"""Looks into attention: the weights and the hash buckets of every layer.

Any attention here is linear in its values, so that attending to the rows of an identity matrix
gives the weights, whatever the mechanism; what is approximated shows as it is used.

Shape letters: B batch, T queries, S keys, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array, Float
from fast_attention.layers.multi_head import MultiHeadAttention
from fast_attention.layers.stack import Stack


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
    twice. Linformer layers, whose weights are of mixtures of positions, are not recorded.

    Args:
      model: Any module with `MultiHeadAttention` layers inside.
      *args: Of the call, such as tokens.
      **kwargs: Of the call; without dropout.

    Returns:
      One `Recording` per call and group of heads, in the order of the calls.
    """
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, state, copy=True)
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
        elif isinstance(module, Stack):
            # Under rematerialisation there would be no numbers to keep.
            module.config = dataclasses.replace(module.config, remat=False)
    copy(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return kept


class _Recorded:
    """An attention function that also keeps its weights."""

    def __init__(
        self, function: Callable[..., Any], path: tuple[Any, ...], group: int, kept: list[Recording]
    ):
        self.function = function
        self.__signature__ = inspect.signature(function)
        self.rotary = getattr(function, "rotary", True)
        self.path, self.group, self.kept = path, group, kept

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        out, buckets = self.function(query, key, value, **options), None
        if options.get("return_buckets"):
            buckets = out.buckets
            options |= {"buckets": buckets}
        one = _unit_values(value, key.shape[1])
        weights = self.function(query, key, one, **options)
        self._keep(weights.out if options.get("return_buckets") else weights, buckets)
        return out

    def init_state(
        self, batch_shape: Any, heads: int, width: int, value_width: int, *, max_length: int
    ) -> _RecordedState:
        """The states of causal memory, one for the values and one for the weights."""
        function: Any = self.function
        values, units = (
            function.init_state(batch_shape, heads, width, number, max_length=max_length)
            for number in (value_width, max_length)
        )
        return _RecordedState(values, units, 0, max_length)

    def prefill(
        self, state: _RecordedState, query: Array, key: Array, value: Array, **options: Any
    ) -> tuple[Array, _RecordedState]:
        """Reads memory first, and then the sequence, whose weights are kept."""
        function: Any = self.function
        out, values = function.prefill(state.values, query, key, value, **options)
        one = _unit_values(value, state.length, state.count)
        weights, units = function.prefill(state.units, query, key, one, **options)
        if state.count:
            # Memory stands behind the sequence, as where it is no state.
            self._keep(jnp.roll(weights, -state.count, axis=-1), None)
        return out, _RecordedState(values, units, state.count + key.shape[1], state.length)

    def _keep(self, weights: Array, buckets: Array | None) -> None:
        weights = jnp.moveaxis(weights.astype(jnp.float32), 1, 2)
        self.kept.append(Recording(self.path, self.group, weights, buckets))


class _RecordedState(NamedTuple):
    values: Any
    units: Any
    count: int
    length: int


def _unit_values(value: Array, length: int, start: int = 0) -> Array:
    """Values of which the i-th is the unit vector ``start + i``."""
    one = jnp.eye(value.shape[1], length, start, dtype=value.dtype)[None, :, None]
    return jnp.broadcast_to(one, (*value.shape[:-1], length))
