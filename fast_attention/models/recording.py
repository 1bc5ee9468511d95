"""Looks into attention: the weights and the hash buckets of every layer.

Any attention here is linear in its values, so that attending to the rows of an identity matrix
gives the weights, whatever the mechanism; what is approximated shows as it is used.

Shape letters: B batch, T queries, S keys, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.stack.stack import Stack
from fast_attention.mechanisms.call import Call
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.wrapped import WrappedAttention


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
    twice. Other layers that mix positions are not recorded.

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
                    group, attention_fn=_Recorded(group.attention_fn, path, index, kept.append)
                )
                for index, group in enumerate(module.config.groups)
            )
            module.config = dataclasses.replace(module.config, groups=groups)
        elif isinstance(module, Stack):
            # Under rematerialisation there would be no numbers to keep.
            module.config = dataclasses.replace(module.config, remat=False)
    copy(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return kept


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorded(WrappedAttention):
    """An attention function that also keeps its weights."""

    path: tuple[Any, ...]
    group: int
    keep: Callable[[Recording], None]

    def attend(self, call: Call) -> Any:
        """Attends, and once more to the unit vectors."""
        out, buckets = self.attention_fn.attend(call), call.buckets
        if call.return_buckets:
            buckets = out.buckets
        one = _unit_values(call.value, call.key.shape[1])
        weights = self.attention_fn.attend(dataclasses.replace(call, value=one, buckets=buckets))
        self._keep(weights.out if call.return_buckets else weights, buckets)
        return out

    def start(self, sizes: StateSizes) -> _RecordedState:
        """The states of causal memory, one for the values and one for the weights."""
        assert sizes.max_length is not None
        units = self.attention_fn.start(sizes._replace(value_dim=sizes.max_length))
        return _RecordedState(self.attention_fn.start(sizes), units, 0, sizes.max_length)

    def read(self, state: _RecordedState, call: Call) -> tuple[Array, _RecordedState]:
        """Reads memory first, and then the sequence, whose weights are kept."""
        out, values = self.attention_fn.read(state.values, call)
        one = _unit_values(call.value, state.length, state.count)
        weights, units = self.attention_fn.read(state.units, dataclasses.replace(call, value=one))
        if state.count:
            # Memory stands behind the sequence, as where it is no state.
            self._keep(jnp.roll(weights, -state.count, axis=-1), None)
        count = state.count + call.key.shape[1]
        return out, _RecordedState(values, units, count, state.length)

    def read_one(self, state: _RecordedState, call: Call) -> tuple[Array, _RecordedState]:
        """Reads one token as :meth:`read` does."""
        return self.read(state, call)

    def keep_types(self, after: _RecordedState, before: _RecordedState) -> _RecordedState:
        """Keeps the types of the inner states; the numbers beside them are known in Python."""
        values, units = (
            self.attention_fn.keep_types(*pair)
            for pair in ((after.values, before.values), (after.units, before.units))
        )
        return after._replace(values=values, units=units)

    def _keep(self, weights: Array, buckets: Array | None) -> None:
        weights = jnp.moveaxis(weights.astype(jnp.float32), 1, 2)
        self.keep(Recording(self.path, self.group, weights, buckets))


class _RecordedState(NamedTuple):
    values: Any
    units: Any
    count: int
    length: int


def _unit_values(value: Array, length: int, start: int = 0) -> Array:
    """Values of which the i-th is the unit vector ``start + i``."""
    one = jnp.eye(value.shape[1], length, start, dtype=value.dtype)[None, :, None]
    return jnp.broadcast_to(one, (*value.shape[:-1], length))
