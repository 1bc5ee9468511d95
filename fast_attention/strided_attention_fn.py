"""Strided attention as an ``attention_fn`` around another one, with decoding.

Shape letters: B batch, T length, W stride, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.call_arguments import check_heads
from fast_attention.folding import check_stride, fold, strided_attention, unfold
from fast_attention.masks import key_mask_from_mask
from fast_attention.ragged import from_grid, places, to_grid
from fast_attention.recipes import attention_factory


class StridedState(NamedTuple):
    """What decoding remembers.

    Attributes:
      classes: the inner function's state for every class by itself, ``[*B, W, ...]``.
      count: ``[*B]`` int32, the tokens so far.
    """

    classes: Any
    count: Int[Array, "*B"]


@dataclasses.dataclass(frozen=True)
class StridedAttention:
    """Any ``attention_fn`` among positions a stride apart, from :func:`make_strided_attention`.

    Attributes:
      attention_fn: what attends within a class of positions.
      stride: W.
    """

    attention_fn: Any
    stride: int

    @property
    def unidirectional(self) -> bool:
        """Whether the inner function is causal by itself."""
        return getattr(self.attention_fn, "unidirectional", False)

    def __call__(
        self,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B T K D"],
        value: Float[Array, "*B T K V"],
        bias: None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        module: None = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: None = None,
        attn_weights_value_einsum: None = None,
        input_positions: None = None,
        *,
        axis: None = None,
        key_mask: Bool[Array, "*B T"] | None = None,
        segment_ids: Int[Array, "*B T"] | None = None,
        projection: Array | None = None,
    ) -> Float[Array, "*B T H V"]:
        """Attends.

        Args:
          query: ``[*B, T, H, D]``.
          key: ``[*B, T, K, D]``.
          value: ``[*B, T, K, V]``.
          bias: must be None.
          mask: broadcastable to ``[*B, H, T, T]``: constant over queries, or padding x padding,
            times causality if the function is causal, the same for all heads; another one raises.
          broadcast_dropout: handed on; the classes of a row count as batch.
          dropout_rng: handed on.
          dropout_rate: handed on.
          deterministic: no dropout.
          dtype: handed on.
          precision: handed on.
          module: must be None.
          is_causal: position t sees positions t, t - W, t - 2 W, ...
          force_fp32_for_softmax: exponents are float32 at least, whether asked for or not.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None.
          axis: must be None.
          key_mask: ``[*B, T]``, True = visible.
          segment_ids: ``[*B, T]``: attention stays within runs of equal ids.
          projection: handed on.

        Returns:
          ``[*B, T, H, V]``.

        Raises:
          ValueError: for anything that cannot be honoured.
        """
        del force_fp32_for_softmax  # Always so.
        refused = {
            "bias": bias,
            "module": module,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
            "input_positions": input_positions,
            "axis": axis,
        }
        for name, given in refused.items():
            if given is not None:
                raise ValueError(f"Attention with a stride does not take {name}: leave it out.")
        if mask is not None:
            key_mask = self._with_mask(mask, query, key, key_mask, is_causal)
        options = {} if projection is None else {"projection": projection}
        return strided_attention(
            self.attention_fn,
            query,
            key,
            value,
            stride=self.stride,
            key_mask=key_mask,
            segment_ids=segment_ids,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            is_causal=is_causal,
            **options,
        )

    def draw_projection(self, key: Array, head_dim: int) -> Array | None:
        """Draws what the inner function draws."""
        return self.attention_fn.draw_projection(key, head_dim)

    def init_state(
        self,
        batch_shape: tuple[int, ...],
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_length: int | None = None,
    ) -> StridedState:
        """Returns the state before the first token, a state of the inner function for each class.

        ``max_length`` tokens may come in one prompt and single steps; a state that keeps all
        tokens may have no room for as many in several prompts.

        Raises:
          TypeError: if the inner function cannot decode.
        """
        if not hasattr(self.attention_fn, "init_state"):
            raise TypeError(
                f"{self.attention_fn} cannot decode: it has no init_state, prefill and step."
            )
        if max_length is not None:
            # A prompt may leave an unused place at both ends of a class.
            max_length = -(-max_length // self.stride) + 2
        one = self.attention_fn.init_state(
            (), num_kv_heads, head_dim, value_dim, max_length=max_length
        )
        shape = (*batch_shape, self.stride)
        classes = jax.tree.map(
            lambda x: jnp.broadcast_to(x.reshape((1,) * len(shape) + x.shape), shape + x.shape), one
        )
        return StridedState(classes, jnp.zeros(batch_shape, jnp.int32))

    def prefill(
        self,
        state: StridedState,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B T K D"],
        value: Float[Array, "*B T K V"],
        *,
        key_mask: Bool[Array, "*B T"] | None = None,
        projection: Array | None = None,
    ) -> tuple[Float[Array, "*B T H V"], StridedState]:
        """Reads T tokens causally, continuing ``state``; padding (False) takes no place."""
        check_heads(query, key, value)
        batch_shape, stride = query.shape[:-3], self.stride
        visible = jnp.ones(query.shape[:-2], bool) if key_mask is None else key_mask
        # Every token gets its place on a grid whose first row may be partly taken.
        slots = -(-(stride - 1 + query.shape[-3]) // stride) * stride
        place = places(state.count % stride, visible)

        def on_grid(x: Array) -> Array:
            grid = to_grid(x, place, visible, slots)
            folded = fold(grid, stride, trailing=x.ndim - visible.ndim)
            return folded.reshape(-1, *folded.shape[visible.ndim :])

        def one_class(state, query, key, value, key_mask):
            options = {} if projection is None else {"projection": projection}
            return self.attention_fn.prefill(state, query, key, value, key_mask=key_mask, **options)

        axes = len(batch_shape) + 1
        classes = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), state.classes)
        arrays = [on_grid(x) for x in (query, key, value, visible)]
        out, classes = jax.vmap(one_class)(classes, *arrays)
        classes = jax.tree.map(lambda x: x.reshape(*batch_shape, stride, *x.shape[1:]), classes)
        out = out.reshape(*batch_shape, stride, *out.shape[1:])
        out = from_grid(unfold(out, slots, trailing=2), place)
        return out, StridedState(classes, state.count + visible.sum(-1, dtype=jnp.int32))

    def step(
        self,
        state: StridedState,
        query: Float[Array, "*B H D"],
        key: Float[Array, "*B K D"],
        value: Float[Array, "*B K V"],
        *,
        projection: Array | None = None,
    ) -> tuple[Float[Array, "*B H V"], StridedState]:
        """Reads one token: only the state of its class is touched."""
        batch_shape = query.shape[:-2]
        axes = len(batch_shape)

        def one_row(classes, count, query, key, value):
            options = {} if projection is None else {"projection": projection}
            now = count % self.stride
            own = jax.tree.map(lambda x: x[now], classes)
            out, own = self.attention_fn.step(own, query, key, value, **options)
            return out, jax.tree.map(lambda all, one: all.at[now].set(one), classes, own)

        flat = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[axes:]),
            (state.classes, state.count, query, key, value),
        )
        out, classes = jax.tree.map(
            lambda x: x.reshape(*batch_shape, *x.shape[1:]), jax.vmap(one_row)(*flat)
        )
        return out, StridedState(classes, state.count + 1)

    def _with_mask(
        self, mask: Array, query: Array, key: Array, key_mask: Array | None, is_causal: bool
    ) -> Array:
        """Brings a mask to one of keys, ``[*B, T]``."""
        keys = key_mask_from_mask(
            mask,
            batch_shape=query.shape[:-3],
            num_queries=query.shape[-3],
            num_keys=key.shape[-3],
            num_heads=query.shape[-2],
            num_kv_heads=key.shape[-2],
            causal=self.unidirectional or is_causal,
        )
        if keys.shape[-1] != 1:
            raise ValueError(
                f"Attention with a stride takes masks that are the same for all heads, got one of "
                f"shape {mask.shape}; give it one head axis of length 1."
            )
        return keys[..., 0] if key_mask is None else keys[..., 0] & key_mask


@attention_factory
def make_strided_attention(attention_fn: Any, stride: int) -> StridedAttention:
    """Makes an ``attention_fn`` attend among positions that are congruent modulo ``stride``.

    Args:
      attention_fn: from any of the factories.
      stride: W, at least 1.

    Returns:
      An ``attention_fn`` that decodes if the inner one does.

    Raises:
      ValueError: for a stride below 1.
    """
    check_stride(stride)
    return StridedAttention(attention_fn, stride)
