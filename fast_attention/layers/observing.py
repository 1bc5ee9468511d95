"""Copies of models whose attention functions tell what they are called with.

Shape letters: B batch, T queries, S keys (T, and what memory and context add behind), H heads,
K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array, Float
from fast_attention.layers.attention_call import (
    Visible,
    call_attention,
    causal_by_mask,
    parameter_names,
)
from fast_attention.layers.multi_axis import MultiAxisAttention
from fast_attention.layers.multi_head import MultiHeadAttention
from fast_attention.layers.stack import Stack

Path = tuple[Any, ...]

_TOLD = ("is_causal", "key_mask", "segment_ids", "mask", "positions", "query_mask")


class AttentionCall(NamedTuple):
    """What a group of heads of a layer is asked in one call.

    Attributes:
      function: The attention function of the layer.
      path: Where the layer is in the model.
      group: Which of its groups of heads.
      query: ``[B, T, H, D]``, after rotary positions, as the function is given it.
      key: ``[B, S, K, D]``.
      value: ``[B, S, K, V]``.
      visible: Which keys are seen, and which positions are padding.
      options: What else the function is given, such as its projection.
      memory: How many of the keys, the last, are read into a state before the first query.
    """

    function: Callable[..., Any]
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
        """Of the group of heads, such as ``stack.blocks.0.0.inner:0``."""
        return place_name(self.path, self.group)

    def attend(self, **replaced: Any) -> Any:
        """Calls the function as the layer does.

        Args:
          **replaced: Attributes to be others, such as ``value`` or ``function``.

        Returns:
          What the function returns, ``[B, T, H, V]``.
        """
        call = self._replace(**replaced)
        if call.memory and hasattr(call.function, "init_state"):
            return call._after_memory()
        visible = call.visible
        if call.memory:
            visible = causal_by_mask(visible, call.query.shape[1])
        return call_attention(
            call.function, call.query, call.key, call.value, visible, **call.options
        )

    def _after_memory(self) -> Array:
        function: Any = self.function
        length = self.query.shape[1]
        sizes = (len(self.key),), *self.key.shape[-2:], self.value.shape[-1]
        state = function.init_state(*sizes, max_length=self.key.shape[1])
        masks: list[Any] = [None, None]
        if self.visible.key_mask is not None:
            masks = [self.visible.key_mask[:, length:], self.visible.key_mask[:, :length]]
        unasked = jnp.zeros((len(self.key), self.memory, *self.query.shape[2:]), self.query.dtype)
        parts = ((unasked, slice(length, None)), (self.query, slice(length)))
        out = unasked
        for (query, part), mask in zip(parts, masks, strict=True):
            out, state = function.prefill(
                state, query, self.key[:, part], self.value[:, part], key_mask=mask, **self.options
            )
        return out


Tell = Callable[[AttentionCall], None]


def observed_copy(
    model: nnx.Module, tell: Tell, where: Callable[[Any], bool] = lambda function: True
) -> Any:
    """Copies a model, so that its attention layers tell of every call.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers inside; it is left
        as it is.
      tell: Called with each `AttentionCall`, in the trace of the model's caller: nothing is
        rematerialised, and two streams are differentiated as any other program.
      where: Of which attention functions to tell.

    Returns:
      The copy, which computes what the model does.
    """

    def watched(function: Callable[..., Any], path: Path, group: int) -> Any:
        if not where(function):
            return function
        kind = _WatchedMemory if hasattr(function, "init_state") else _Watched
        return kind(function, path, group, tell)

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
    """Names a group of heads of a layer."""
    return f"{'.'.join(map(str, path))}:{group}"


class _MemoryState(NamedTuple):
    """The state of a function, and what was read into it before the sequence."""

    inner: Any
    read: AttentionCall | None


class _Watched:
    """An attention function that tells of its calls."""

    def __init__(self, function: Callable[..., Any], path: Path, group: int, tell: Tell):
        self.function, self.path, self.group, self.tell = function, path, group, tell
        # All that a layer knows is told, whatever the function makes of it.
        names = {*_TOLD, *((parameter_names(function) or set()) & {"return_buckets"})}
        kind = inspect.Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, kind) for name in sorted(names)]
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        told = {name: options.pop(name, None) for name in _TOLD}
        batch = query.shape[:-3]
        if len(batch) != 1:
            # Attention over some of several axes: the others are batch.
            query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        key_mask, mask = told["key_mask"], told["mask"]
        if key_mask is not None:
            key_mask = key_mask.reshape(key.shape[:2])
        if told["query_mask"] is None and query.shape[1] == key.shape[1]:
            told["query_mask"] = key_mask
        told |= {
            "causal": bool(told.pop("is_causal")),
            "key_mask": key_mask,
            "mask": None if mask is None else mask[:, 0, :, : query.shape[1]],
        }
        call = AttentionCall(
            self.function, self.path, self.group, query, key, value, Visible(**told), options
        )
        self.tell(call._replace(options=_without_buckets(options)))
        out = call.attend()
        return out.reshape(*batch, *out.shape[1:]) if len(batch) != 1 else out


class _WatchedMemory(_Watched):
    """A function that reads memory into a state before the sequence, where a layer has memory."""

    def init_state(self, *sizes: Any, **options: Any) -> _MemoryState:
        """The state that memory is read into, which comes before the sequence."""
        function: Any = self.function
        return _MemoryState(function.init_state(*sizes, **options), None)

    def prefill(
        self, state: _MemoryState, query: Array, key: Array, value: Array, **options: Any
    ) -> tuple[Array, _MemoryState]:
        """Reads memory first, and then the sequence, of which it tells."""
        function: Any = self.function
        out, inner = function.prefill(state.inner, query, key, value, **options)
        mask = options.pop("key_mask", None)
        visible = Visible(causal=True, key_mask=mask, query_mask=mask)
        call = AttentionCall(
            self.function, self.path, self.group, query, key, value, visible, options
        )
        before = state.read
        if before is None:
            return out, _MemoryState(inner, call)
        memory = before.key.shape[1]
        if mask is not None:
            seen = jnp.ones((len(mask), memory), bool)
            visible = visible._replace(key_mask=jnp.concatenate([mask, seen], axis=1))
        self.tell(
            call._replace(
                key=jnp.concatenate([key, before.key], axis=1),
                value=jnp.concatenate([value, before.value], axis=1),
                visible=visible,
                memory=memory,
            )
        )
        return out, _MemoryState(inner, call)


def _without_buckets(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in options.items() if name not in ("buckets", "return_buckets")}
