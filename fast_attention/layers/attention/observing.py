"""Copies of models whose attention functions report their calls.

Shape letters: B batch, T queries, S keys (T, then memory and context), H heads,
K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.attention.attention_call import Visible, call_attention, causal_by_mask
from fast_attention.layers.attention.head_groups import attend_after_memory
from fast_attention.layers.attention.multi_axis import MultiAxisAttention
from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.stack.stack import Stack
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.wrapped import WrappedAttention

Path = tuple[Any, ...]


class AttentionCall(NamedTuple):
    """A call of the attention function of a group of heads.

    Attributes:
      function: The attention function of the layer.
      path: Where the layer is in the model.
      group: Which of its groups of heads.
      query: ``[B, T, H, D]``, after rotary positions, as passed to the function.
      key: ``[B, S, K, D]``.
      value: ``[B, S, K, V]``.
      visible: Masks of keys and of padding.
      options: Other arguments of the function, such as its projection.
      memory: Number of keys (the last ones) that are read into a state before the first query.
    """

    function: AttentionFn
    path: Path
    group: int
    query: Float[Array, "B T H D"]
    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K V"]
    visible: Visible
    options: dict[str, Any]
    memory: int = 0

    @property
    def name(self) -> str:
        """Name of the group of heads, such as ``stack.blocks.0.0.inner:0``."""
        return place_name(self.path, self.group)

    def attend(self, **replaced: Any) -> Any:
        """Calls the function like the layer.

        Args:
          **replaced: New values of attributes, such as ``value`` or ``function``.

        Returns:
          The result of the function, ``[B, T, H, V]``.
        """
        call = self._replace(**replaced)
        if call.memory and call.function.can_decode:
            return attend_after_memory(
                call.function, call.query, call.key, call.value, call.visible.key_mask, call.options
            )
        visible = call.visible
        if call.memory:
            visible = causal_by_mask(visible, call.query.shape[1])
        return call_attention(
            call.function, call.query, call.key, call.value, visible, **call.options
        )


Tell = Callable[[AttentionCall], None]


def observed_copy(
    model: nnx.Module, tell: Tell, where: Callable[[Any], bool] = lambda function: True
) -> Any:
    """Copies a model, so that its attention layers report every call.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers inside; it is not
        changed.
      tell: Called with each `AttentionCall`, in the trace of the model's caller: without
        rematerialisation, and with ordinary differentiation of reversible streams.
      where: Function that selects attention functions to report.

    Returns:
      The copy, which gives the same results as the model.
    """

    def watched(function: AttentionFn, path: Path, group: int) -> AttentionFn:
        return _Watched(function, path, group, tell) if where(function) else function

    copy = nnx.clone(model)
    for path, module in nnx.iter_modules(copy):
        if isinstance(module, MultiHeadAttention):
            groups = tuple(
                dataclasses.replace(group, attention_fn=watched(group.attention_fn, path, index))
                for index, group in enumerate(module.config.groups)
            )
            module.config = dataclasses.replace(module.config, groups=groups)
        elif isinstance(module, MultiAxisAttention):
            module.attention_fn = watched(module.attention_fn, path, 0)
        elif isinstance(module, Stack):
            module.config = dataclasses.replace(module.config, remat=False, reverse_threshold=2**62)
    return copy


def place_name(path: Path, group: int) -> str:
    """Returns the name of a group of heads of a layer."""
    return f"{'.'.join(map(str, path))}:{group}"


class _MemoryState(NamedTuple):
    """The state of a function, and the memory that was read before the sequence."""

    inner: Any
    read: AttentionCall | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Watched(WrappedAttention):
    """An attention function that reports its calls, also with memory."""

    path: Path
    group: int
    tell: Tell

    def attend(self, call: Call) -> Any:
        """Reports the call, and attends."""
        rank = call.query.ndim - 3
        flat = call if rank == 1 else _with_one_batch_axis(call, rank)
        key_mask = None if flat.key_mask is None else flat.key_mask[..., 0]
        query_mask = flat.query_mask
        if query_mask is None and call.query.shape[-3] == call.key.shape[-3]:
            query_mask = key_mask
        visible = Visible(
            causal=call.causal,
            key_mask=key_mask,
            segment_ids=flat.segment_ids,
            positions=flat.positions,
            mask=None if flat.mask is None else flat.mask[:, 0, :, : call.query.shape[-3]],
            query_mask=query_mask,
        )
        self.tell(self._reported(flat, visible))
        return self.attention_fn.attend(call)

    def start(self, sizes: StateSizes) -> _MemoryState:
        """The state into which memory is read before the sequence."""
        return _MemoryState(self.attention_fn.start(sizes), None)

    def read(self, state: _MemoryState, call: Call) -> tuple[Array, _MemoryState]:
        """Reads memory first, then the sequence, and reports the call."""
        out, inner = self.attention_fn.read(state.inner, call)
        mask = None if call.key_mask is None else call.key_mask[..., 0]
        visible = Visible(causal=True, key_mask=mask, query_mask=mask)
        reported = self._reported(call, visible)
        before = state.read
        if before is None:
            return out, _MemoryState(inner, reported)
        memory = before.key.shape[1]
        if mask is not None:
            seen = jnp.ones((len(mask), memory), bool)
            visible = visible._replace(key_mask=jnp.concatenate([mask, seen], axis=1))
        self.tell(
            reported._replace(
                key=jnp.concatenate([call.key, before.key], axis=1),
                value=jnp.concatenate([call.value, before.value], axis=1),
                visible=visible,
                memory=memory,
            )
        )
        return out, _MemoryState(inner, reported)

    def read_one(self, state: _MemoryState, call: Call) -> tuple[Array, _MemoryState]:
        """Reads one token, without a report."""
        out, inner = self.attention_fn.read_one(state.inner, call)
        return out, state._replace(inner=inner)

    def keep_types(self, after: _MemoryState, before: _MemoryState) -> _MemoryState:
        """Keeps the dtypes of the inner state; the call is not part of the state."""
        inner = self.attention_fn.keep_types(after.inner, before.inner)
        return after._replace(inner=inner)

    def _reported(self, call: Call, visible: Visible) -> AttentionCall:
        options: dict[str, Any] = {}
        if call.projection is not None:
            options["projection"] = call.projection
        if call.training_key is not None:
            options |= {"deterministic": False, "dropout_rng": call.training_key}
        if call.dropout is not None:
            rate, broadcast = call.dropout.rate, call.dropout.broadcast
            options |= {"dropout_rate": rate, "broadcast_dropout": broadcast}
        operands = call.query, call.key, call.value
        return AttentionCall(self.attention_fn, self.path, self.group, *operands, visible, options)


def _with_one_batch_axis(call: Call, rank: int) -> Call:
    """Attention over some of several axes; the others are batch axes."""
    names = ("query", "key", "value", "key_mask", "segment_ids", "query_mask", "positions")
    flat = {
        name: x.reshape(-1, *x.shape[rank:])
        for name, x in vars(call).items()
        if name in names and x is not None
    }
    return dataclasses.replace(call, **flat)
