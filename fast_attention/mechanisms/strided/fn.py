"""Strided attention as an ``attention_fn`` around another one, with decoding.

Shape letters: B batch, T length, W stride, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.ragged import from_grid, places, to_grid
from fast_attention.arrays.types import Array, Float, Int
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.checks import check_count
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.strided.folding import fold, run_numbers, unfold
from fast_attention.mechanisms.wrapped import WrappedAttention, as_attention_fn
from fast_attention.recipes import attention_factory
from fast_attention.softmax_attention import SoftmaxAttention


class StridedState(NamedTuple):
    """The decoding state.

    Attributes:
      classes: the inner function's state for each class, ``[*B, W, ...]``.
      count: ``[*B]`` int32, the number of tokens so far.
    """

    classes: Any
    count: Int[Array, "*B"]


@dataclasses.dataclass(frozen=True, eq=False)
class StridedAttention(WrappedAttention):
    """Any ``attention_fn`` among positions a stride apart, from :func:`make_strided_attention`.

    Random features, their parameters and running moments are those of the inner function.

    Attributes:
      attention_fn: the attention function within a class of positions.
      stride: W.
    """

    stride: int

    mechanism = "Strided attention"

    @property
    def takes(self) -> Takes:
        """Key masks that are equal for all heads, and what the inner function takes."""
        inner = self.attention_fn.takes
        honoured = dataclasses.replace(inner, mask="keys", bias=None, decay=False)
        return dataclasses.replace(honoured, other_keys=False, cache=False)

    def attend(self, call: Call) -> Float[Array, "*B T H V"]:
        """Attends; the classes of a row count as batch."""
        length, stride = call.query.shape[-3], self.stride
        key_mask, ids = call.key_mask, call.segment_ids
        if length % stride and key_mask is None:
            key_mask = jnp.ones((*call.key.shape[:-2], 1), bool)
        if ids is not None:
            # Ids of separate runs may be equal and would meet within a class.
            ids = fold(run_numbers(ids), stride, trailing=0)
        places = (call.query_mask, call.positions)
        query_mask, positions = (None if x is None else fold(x, stride, trailing=0) for x in places)
        folded = dataclasses.replace(
            call,
            query=fold(call.query, stride, trailing=2),
            key=fold(call.key, stride, trailing=2),
            value=fold(call.value, stride, trailing=2),
            key_mask=None if key_mask is None else fold(key_mask, stride, trailing=1),
            segment_ids=ids,
            query_mask=query_mask,
            positions=positions,
        )
        return unfold(self.attention_fn.attend(folded), length, trailing=2)

    def exact(self) -> AttentionFn:
        """The exact form of the inner function with the same stride."""
        inner = self.attention_fn.exact() or SoftmaxAttention(self.unidirectional)
        return dataclasses.replace(self, attention_fn=inner)

    def start(self, sizes: StateSizes) -> StridedState:
        """The state of the inner function for each class.

        ``max_length`` tokens may be read as one prompt and single steps. With several prompts, a
        state that keeps all tokens may be too small.
        """
        room = sizes.max_length
        if room is not None:
            # A prompt may leave an unused place at both ends of a class.
            room = -(-room // self.stride) + 2
        shape = (*sizes.batch_shape, self.stride)
        classes = self.attention_fn.start(sizes._replace(batch_shape=shape, max_length=room))
        return StridedState(classes, jnp.zeros(sizes.batch_shape, jnp.int32))

    def read(self, state: StridedState, call: Call) -> tuple[Array, StridedState]:
        """Reads T tokens; padding is skipped."""
        query, stride = call.query, self.stride
        visible = jnp.ones(query.shape[:-2], bool)
        if call.key_mask is not None:
            visible = call.key_mask[..., 0]
        # Every token gets its place on a grid whose first row may be partly taken.
        slots = -(-(stride - 1 + query.shape[-3]) // stride) * stride
        place = places(state.count % stride, visible)

        def on_grid(x: Array) -> Array:
            grid = to_grid(x, place, visible, slots)
            return fold(grid, stride, trailing=x.ndim - visible.ndim)

        shown = on_grid(visible)
        folded = dataclasses.replace(
            call,
            query=on_grid(query),
            key=on_grid(call.key),
            value=on_grid(call.value),
            key_mask=shown[..., None],
            query_mask=shown,
        )
        out, classes = self.attention_fn.read(state.classes, folded)
        out = from_grid(unfold(out, slots, trailing=2), place)
        return out, StridedState(classes, state.count + visible.sum(-1, dtype=jnp.int32))

    def keep_types(self, after: StridedState, before: StridedState) -> StridedState:
        """Keeps the dtypes of the classes' states."""
        return after._replace(classes=self.attention_fn.keep_types(after.classes, before.classes))

    def read_one(self, state: StridedState, call: Call) -> tuple[Array, StridedState]:
        """Reads one token: only the state of its class changes."""
        axes = len(call.query.shape) - 3

        def one_row(classes, count, query, key, value):
            now = count % self.stride
            own = jax.tree.map(lambda x: x[now], classes)
            one = dataclasses.replace(call, query=query, key=key, value=value)
            out, own = self.attention_fn.read_one(own, one)
            return out, jax.tree.map(lambda all, one: all.at[now].set(one), classes, own)

        row = one_row
        for _ in range(axes):
            row = jax.vmap(row)
        out, classes = row(state.classes, state.count, call.query, call.key, call.value)
        return out, StridedState(classes, state.count + 1)


@attention_factory
def make_strided_attention(attention_fn: Callable[..., Any], stride: int) -> StridedAttention:
    """Returns an ``attention_fn`` among positions that are congruent modulo ``stride``.

    Args:
      attention_fn: from any of the factories, or a function like ``nnx.dot_product_attention``.
      stride: W, at least 1.

    Returns:
      An ``attention_fn`` that decodes if the inner one does. It takes only masks of keys that are
      the same for all queries; other masks and biases raise ValueError.

    Raises:
      ValueError: for a stride below 1.
    """
    inner = as_attention_fn(attention_fn)
    if inner.takes.shared_qk:
        raise ValueError(
            f"{inner.mechanism} cannot be used with a stride, because its queries are the first of "
            "its keys."
        )
    return StridedAttention(inner, check_count("stride", stride))


def strided_attention(
    attention: Callable[..., Any],
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    *,
    stride: int,
    **options: Any,
) -> Float[Array, "*B T H V"]:
    """Attends among positions that are congruent modulo ``stride``, for any length.

    Args:
      attention: an ``attention_fn``; its causality is kept, because folding keeps the order.
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      stride: W.
      **options: arguments of the call, such as ``key_mask`` and ``segment_ids``.

    Returns:
      ``[*B, T, H, V]``.

    Raises:
      ValueError: for a stride below 1, or unsupported arguments.
    """
    return make_strided_attention(attention, stride)(query, key, value, **options)
