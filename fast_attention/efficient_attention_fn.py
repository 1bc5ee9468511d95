"""Efficient attention as an ``attention_fn``, with decoding.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.blindspot import (
    BlindspotState,
    empty_blindspot_state,
    prefill_buckets,
    step_buckets,
)
from fast_attention.call_arguments import check_heads, prepare_call, refuse_unsupported
from fast_attention.efficient_attention import efficient_attention
from fast_attention.feature_maps import LogFeatures
from fast_attention.linear_attention import LinearAttentionState, empty_state, prefill, step
from fast_attention.recipes import attention_factory


@dataclasses.dataclass(frozen=True)
class EfficientAttention:
    """Efficient attention with the signature Flax calls, from :func:`make_efficient_attention`.

    Attributes:
      unidirectional: causal, whatever a caller says of causality.
      blindspot_size: positions in a bucket of causal attention that sees earlier buckets only.
      scale_queries: multiply the output by ``D^(-1/2)`` where attention goes both ways.
    """

    unidirectional: bool = False
    blindspot_size: int = 1
    scale_queries: bool = False

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
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Array | None = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        key_mask: Bool[Array, ...] | None = None,
        segment_ids: Int[Array, ...] | None = None,
        projection: None = None,
    ) -> Float[Array, "*B T H V"]:
        """Attends; see :func:`fast_attention.efficient_attention` for what is computed.

        Args:
          query: ``[*B, T, H, D]``, any number of batch axes.
          key: ``[*B, S, K, D]``, H a multiple of K.
          value: ``[*B, S, K, V]``.
          bias: broadcastable to ``[*B, H, T, S]`` and constant over queries; another one raises.
          mask: broadcastable to ``[*B, H, T, S]``: constant over queries, or padding x padding,
            times causality if the function is causal; another one raises.
          broadcast_dropout: drop the same keys for all of batch and heads.
          dropout_rng: random key of dropout.
          dropout_rate: whole keys are dropped from the numerator at this rate, the others scaled
            by ``1 / (1 - rate)``.
          deterministic: no dropout.
          dtype: type of inputs and output; None promotes. Sums are float32 at least.
          precision: of products of weights and values.
          module: must be None.
          is_causal: position t sees keys 0..t, as ``unidirectional``.
          force_fp32_for_softmax: exponents are float32 at least, whether asked for or not.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None.
          axis: attend over this axis, or over several at once, flattened in row-major order; other
            axes before the heads are batch. None is the last axis before the heads.
          key_mask: ``[*B, S]`` or ``[*B, S, K]``, True = visible.
          segment_ids: ``[*B, T]``: attention stays within runs of equal ids.
          projection: must be None.

        Returns:
          ``[*B, T, H, V]``. Rows that see no key are 0.

        Raises:
          ValueError: for anything that cannot be honoured; the message says what to do instead.
        """
        del force_fp32_for_softmax  # Always so.
        refuse_unsupported(
            module, qk_attn_weights_einsum, attn_weights_value_einsum, input_positions
        )
        _refuse_projection(projection)
        causal = self.unidirectional or is_causal
        call = prepare_call(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=0.0 if deterministic else dropout_rate,
            dtype=dtype,
            causal=causal,
            axis=axis,
            key_mask=key_mask,
            segment_ids=segment_ids,
        )
        out = efficient_attention(
            call.query,
            call.key,
            call.value,
            causal=causal,
            blindspot_size=self.blindspot_size,
            scale_queries=self.scale_queries,
            key_mask=call.key_mask,
            key_bias=call.key_bias,
            segment_ids=call.segment_ids,
            precision=precision,
        )
        return call.unfold(out)

    def draw_projection(self, key: Array, head_dim: int) -> None:
        """Draws nothing: there are no random features."""

    def init_state(
        self,
        batch_shape: tuple[int, ...],
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_length: int | None = None,
    ) -> LinearAttentionState | BlindspotState:
        """Returns the state before the first token; its size does not depend on ``max_length``."""
        del max_length
        if self.blindspot_size > 1:
            return empty_blindspot_state(batch_shape, num_kv_heads, head_dim, value_dim)
        return empty_state(LogFeatures(), None, batch_shape, num_kv_heads, head_dim, value_dim)

    def prefill(
        self,
        state: Any,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B T K D"],
        value: Float[Array, "*B T K V"],
        *,
        key_mask: Bool[Array, "*B T"] | None = None,
        projection: None = None,
    ) -> tuple[Float[Array, "*B T H V"], Any]:
        """Reads T tokens causally, continuing ``state``; padding (False) may be on either side."""
        _refuse_projection(projection)
        check_heads(query, key, value)
        if isinstance(state, LinearAttentionState):
            return prefill(
                state,
                query,
                key,
                value,
                feature_map=LogFeatures(),
                parameters=None,
                key_mask=key_mask,
            )
        dtype = jnp.result_type(query, key, value)
        query, key, value = (x.astype(state.complete.kv.dtype) for x in (query, key, value))
        out, state = prefill_buckets(
            state, query, key, value, self.blindspot_size, key_mask=key_mask
        )
        return out.astype(dtype), state

    def step(
        self,
        state: Any,
        query: Float[Array, "*B H D"],
        key: Float[Array, "*B K D"],
        value: Float[Array, "*B K V"],
        *,
        projection: None = None,
    ) -> tuple[Float[Array, "*B H V"], Any]:
        """Reads one token: constant time and memory, however many came before."""
        _refuse_projection(projection)
        if isinstance(state, LinearAttentionState):
            return step(state, query, key, value, feature_map=LogFeatures(), parameters=None)
        dtype = jnp.result_type(query, key, value)
        query, key, value = (x.astype(state.complete.kv.dtype) for x in (query, key, value))
        out, state = step_buckets(state, query, key, value, self.blindspot_size)
        return out.astype(dtype), state


@attention_factory
def make_efficient_attention(
    unidirectional: bool = False, blindspot_size: int = 1, scale_queries: bool = False
) -> EfficientAttention:
    """Makes efficient attention (arXiv:1812.01243), linear in time and memory.

    Args:
      unidirectional: always causal.
      blindspot_size: of causal attention: a query sees complete earlier buckets of so many
        positions, and the first bucket gives zeros; 1 for every position up to the query's own.
      scale_queries: multiply the output by ``D^(-1/2)`` where attention goes both ways, as
        linear-attention-transformer does.

    Returns:
      An ``attention_fn`` that also decodes.

    Raises:
      ValueError: for a ``blindspot_size`` below 1.
    """
    if blindspot_size < 1:
        raise ValueError(f"blindspot_size must be at least 1, got {blindspot_size}.")
    return EfficientAttention(unidirectional, blindspot_size, scale_queries)


def _refuse_projection(projection: Any) -> None:
    if projection is not None:
        raise ValueError("Efficient attention has no random features: leave projection out.")
