"""Exact softmax attention: the baseline, with the contract of the linear mechanisms.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D) + bias_ij) v_j        (arXiv:1706.03762)

Memory is linear in the length, see :mod:`fast_attention.softmax_blocks`.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head
width, V value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.axes import attended_axes, fold_axes, unfold_axes
from fast_attention.call_arguments import refuse
from fast_attention.softmax_blocks import Choices, Extras, blocked_attention, run_bounds

_ADVICE = {
    "module": "attention weights are not kept; bind nnx.dot_product_attention to sow them",
    "input_positions": "apply rotary positions to queries and keys before",
    "projection": "exact attention has no random features",
}
"""What to do in place of an option that there is not."""


class KVCache(NamedTuple):
    """Keys and values seen so far: the decoding state of exact attention.

    Attributes:
      key: ``[*B, S, K, D]`` float32.
      value: ``[*B, S, K, V]`` float32.
      visible: ``[*B, S]`` bool, False in unused slots and where a prompt was padded.
      length: int32 scalar, the slots used so far, padding included.
    """

    key: Float[Array, "*B S K D"]
    value: Float[Array, "*B S K V"]
    visible: Bool[Array, "*B S"]
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class SoftmaxAttention:
    """Exact attention as an ``attention_fn``, from :func:`make_softmax_attention`.

    Attributes:
      unidirectional: position t sees keys 0..t, whatever a caller says of causality.
    """

    unidirectional: bool = False

    def __call__(
        self,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B S K D"],
        value: Float[Array, "*B S K V"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = True,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        key_mask: Array | None = None,
        segment_ids: Array | None = None,
        projection: Array | None = None,
    ) -> Float[Array, "*B T H V"]:
        """Attends. A query that sees no key gives zeros.

        Args:
          query: ``[*B, T, H, D]``, any number of batch axes.
          key: ``[*B, S, K, D]``; K divides H, query head h reads key head ``h // (H / K)``.
          value: ``[*B, S, K, V]``.
          bias: added to the scores, broadcastable to ``[*B, H, T, S]``.
          mask: bool or 0/1, broadcastable to ``[*B, H, T, S]``; True sees.
          broadcast_dropout: the batch and the heads share the dropped weights.
          dropout_rng: key of the dropout of attention weights.
          dropout_rate: probability to drop a weight.
          deterministic: no dropout.
          dtype: to compute in, by default the promoted type of the inputs. The softmax is
            always in float32 (float64 for such inputs).
          precision: of the two products.
          module: must be None, weights are not kept.
          is_causal: position t sees keys 0..t, where T = S. One query over many keys is a step
            with a cache: the mask alone decides then.
          force_fp32_for_softmax: has no effect: the softmax is in float32 in either case.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None, apply rotary positions before.
          axis: attend over this axis, or over several at once, flattened in row-major order;
            other axes before the heads are batch. None is the last axis before the heads. With
            several axes, T and S in masks are the products of their lengths.
          key_mask: ``[*B, S]`` bool (the shape of key without heads and width); a key where it
            is False is not seen.
          segment_ids: as ``key_mask``, integers, self-attention only: positions see their own
            run of equal ids.
          projection: must be None.

        Returns:
          ``[*B, T, H, V]`` in ``dtype``.

        Raises:
          ValueError: for shapes that do not fit, or an option that exact attention does not
            have.
        """
        refuse(
            "Exact attention",
            _ADVICE,
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
            projection=projection,
        )
        if segment_ids is not None:
            segment_ids = _of_queries("segment_ids", segment_ids, query)
        dtype = jnp.result_type(query, key, value, float) if dtype is None else dtype
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        axes, unfolded = attended_axes(query.ndim, axis), query.shape
        query, key, value = (fold_axes(x, axes, trailing=2) for x in (query, key, value))
        if key_mask is not None:
            key_mask = fold_axes(key_mask, axes, trailing=0)
        _check_shapes(query, key, value)
        length, key_length = query.shape[-3], key.shape[-3]
        causal = (self.unidirectional or is_causal) and not 1 == length < key_length
        if causal and length != key_length:
            raise ValueError(
                f"Causal attention is self-attention, but there are {length} queries and "
                f"{key_length} keys: pass equal lengths, or continue a cache with prefill."
            )
        if segment_ids is not None and length != key_length:
            raise ValueError(
                f"segment_ids are for self-attention, but there are {length} queries and "
                f"{key_length} keys: pass a mask of equal segments instead."
            )
        first = last = None
        if segment_ids is not None:
            first, last = run_bounds(fold_axes(segment_ids, axes, trailing=0))
            last = None if causal else last
        drop = dropout_rate > 0 and not deterministic
        if drop and dropout_rng is None:
            raise ValueError(
                f"dropout_rate={dropout_rate} needs a dropout_rng: pass one, or deterministic=True."
            )
        out = blocked_attention(
            query,
            key,
            value,
            Extras(bias, mask, key_mask, first, last, dropout_rng if drop else None),
            Choices(causal, dropout_rate, broadcast_dropout, precision),
        )
        return unfold_axes(out, axes, unfolded)

    def draw_projection(self, key: Array, head_dim: int) -> None:
        """Draws nothing: exact attention has no random features."""

    def init_state(
        self,
        batch_shape: Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_length: int | None = None,
    ) -> KVCache:
        """Makes an empty cache.

        Args:
          batch_shape: batch axes.
          num_kv_heads: K.
          head_dim: D.
          value_dim: V.
          max_length: tokens it has room for.

        Returns:
          A :class:`KVCache` with S = ``max_length``.

        Raises:
          ValueError: without a positive ``max_length``.
        """
        if max_length is None or max_length < 1:
            raise ValueError(
                f"A key-value cache needs max_length >= 1, the tokens it will hold, "
                f"got {max_length}."
            )
        slots = (*batch_shape, max_length)
        return KVCache(
            key=jnp.zeros((*slots, num_kv_heads, head_dim)),
            value=jnp.zeros((*slots, num_kv_heads, value_dim)),
            visible=jnp.zeros(slots, bool),
            length=jnp.zeros((), jnp.int32),
        )

    def prefill(
        self,
        state: KVCache,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B T K D"],
        value: Float[Array, "*B T K V"],
        *,
        key_mask: Bool[Array, "*B T"] | None = None,
        projection: Array | None = None,
    ) -> tuple[Float[Array, "*B T H V"], KVCache]:
        """Attends causally to the cache and the new tokens, and appends these.

        Args:
          state: what came before.
          query: ``[*B, T, H, D]``.
          key: ``[*B, T, K, D]``.
          value: ``[*B, T, K, V]``.
          key_mask: ``[*B, T]`` bool; False is padding, on either side, and is never seen.
          projection: must be None.

        Returns:
          ``[*B, T, H, V]`` and the longer cache. If the cache is too short, and its length
          not known while tracing, the output is NaN.

        Raises:
          ValueError: if the cache is too short, where that is known.
        """
        refuse("Exact attention", _ADVICE, projection=projection)
        room, new = state.key.shape[-3], key.shape[-3]
        used = state.length
        if new > room or not isinstance(used, Tracer) and int(used) + new > room:
            raise ValueError(
                f"{new} new tokens do not fit a cache of {room}: make it with a larger max_length."
            )
        if key_mask is None:
            key_mask = jnp.ones(key.shape[:-2], bool)

        def append(cache: Array, update: Array, axis: int) -> Array:
            return lax.dynamic_update_slice_in_dim(cache, update.astype(cache.dtype), used, axis)

        state = KVCache(
            key=append(state.key, key, -3),
            value=append(state.value, value, -3),
            visible=append(state.visible, key_mask, -1),
            length=used + new,
        )
        out = blocked_attention(
            query,
            state.key.astype(query.dtype),
            state.value.astype(query.dtype),
            Extras(key_mask=state.visible),
            Choices(causal=True),
            used,
        )
        return jnp.where(state.length <= room, out, jnp.nan).astype(query.dtype), state

    def step(
        self,
        state: KVCache,
        query: Float[Array, "*B H D"],
        key: Float[Array, "*B K D"],
        value: Float[Array, "*B K V"],
        *,
        projection: Array | None = None,
    ) -> tuple[Float[Array, "*B H V"], KVCache]:
        """Appends one token and attends to all so far: :meth:`prefill` with T = 1."""
        out, state = self.prefill(
            state,
            *(jnp.expand_dims(x, -3) for x in (query, key, value)),
            projection=projection,
        )
        return jnp.squeeze(out, -3), state


def make_softmax_attention(unidirectional: bool = False) -> SoftmaxAttention:
    """Makes exact attention.

    Args:
      unidirectional: always causal.

    Returns:
      An ``attention_fn`` that also decodes with a :class:`KVCache`.
    """
    return SoftmaxAttention(unidirectional=unidirectional)


def _of_queries(name: str, x: Array, query: Array) -> Array:
    shape = query.shape[:-2]
    if x.ndim != len(shape) or any(n not in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must have the shape of query without heads and width, {shape}, got {x.shape}."
        )
    return jnp.broadcast_to(x, shape)


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim >= 3:
        raise ValueError(
            f"Expected query [*B, T, H, D], key [*B, S, K, D] and value [*B, S, K, V], got {shapes}"
        )
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"The batch axes of queries, keys and values must be equal, got {shapes}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"Queries and keys must have the same width D, got {shapes}.")
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(f"Keys and values must agree in length and heads, got {shapes}.")
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"The {key.shape[-2]} key/value heads must divide the {query.shape[-2]} query heads, "
            f"got {shapes}; the layout is [*B, length, heads, width]."
        )
