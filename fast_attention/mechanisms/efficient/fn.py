"""Efficient attention as an ``attention_fn``, with decoding.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps import LogFeatures
from fast_attention.linear import LinearAttentionState, Plan, empty_state, prefill, step
from fast_attention.linear.implementations import implementation_names
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.checks import check_count
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.efficient.blindspot import (
    BlindspotState,
    empty_blindspot_state,
    prefill_buckets,
    step_buckets,
)
from fast_attention.mechanisms.efficient.op import efficient_attention
from fast_attention.recipes import attention_factory


@dataclasses.dataclass(frozen=True, eq=False)
class EfficientAttention(AttentionFn):
    """Efficient attention with the signature Flax calls, from :func:`make_efficient_attention`.

    Attributes:
      unidirectional: causal, whatever the caller's ``is_causal`` is.
      blindspot_size: size of the buckets of causal attention; a position sees earlier buckets only.
      scale_queries: multiply the output of bidirectional attention by ``D^(-1/2)``.
      implementation: of :func:`fast_attention.linear_attention`, which computes causal attention
        without a blindspot and attention within segments; other cases have one implementation.
    """

    unidirectional: bool = False
    blindspot_size: int = 1
    scale_queries: bool = False
    implementation: str | None = None

    mechanism = "Efficient attention"
    forward_mode = "make it with implementation='reference', which supports it"

    @property
    def takes(self) -> Takes:
        """Masks and biases of keys, dropout of keys."""
        return Takes(
            cache=self.blindspot_size == 1,
            # Only causal attention has a blind spot.
            symbolic_lengths=self.blindspot_size == 1 or not self.unidirectional,
        )

    def attend(self, call: Call) -> Float[Array, "*B T H V"]:
        """Attends; see :func:`fast_attention.efficient_attention` for what is computed."""
        return efficient_attention(
            call.query,
            call.key,
            call.drop_keys(),
            causal=call.causal or call.steps,
            blindspot_size=self.blindspot_size,
            scale_queries=self.scale_queries,
            key_mask=call.key_mask,
            key_bias=call.key_bias,
            segment_ids=call.segment_ids,
            precision=call.precision,
            implementation=self.implementation,
        )

    def start(self, sizes: StateSizes) -> LinearAttentionState | BlindspotState:
        """The state before the first token; its size does not depend on ``max_length``."""
        shape = sizes.batch_shape, sizes.num_kv_heads, sizes.head_dim, sizes.value_dim, sizes.dtype
        if self.blindspot_size > 1:
            return empty_blindspot_state(*shape)
        return empty_state(LogFeatures(), None, *shape)

    def read(self, state: Any, call: Call) -> tuple[Float[Array, "*B T H V"], Any]:
        """Reads T tokens; padding may be on either side."""
        key_mask = None if call.key_mask is None else call.key_mask[..., 0]
        operands = call.query, call.key, call.value
        if isinstance(state, LinearAttentionState):
            plan = Plan(LogFeatures(), precision=call.precision, implementation=self.implementation)
            return prefill(state, *operands, plan=plan, parameters=None, key_mask=key_mask)
        query, key, value = (x.astype(state.complete.kv.dtype) for x in operands)
        out, state = prefill_buckets(
            state,
            query,
            key,
            value,
            self.blindspot_size,
            key_mask=key_mask,
            precision=call.precision,
        )
        return out.astype(call.query.dtype), state

    def read_one(self, state: Any, call: Call) -> tuple[Float[Array, "*B 1 H V"], Any]:
        """Reads one token, in constant time and memory."""
        operands = [jnp.squeeze(x, -3) for x in (call.query, call.key, call.value)]
        if isinstance(state, LinearAttentionState):
            plan = Plan(LogFeatures(), precision=call.precision)
            out, state = step(state, *operands, plan=plan, parameters=None)
        else:
            query, key, value = (x.astype(state.complete.kv.dtype) for x in operands)
            out, state = step_buckets(
                state, query, key, value, self.blindspot_size, precision=call.precision
            )
            out = out.astype(call.query.dtype)
        return jnp.expand_dims(out, -3), state


@attention_factory
def make_efficient_attention(
    unidirectional: bool = False,
    blindspot_size: int = 1,
    scale_queries: bool = False,
    *,
    implementation: str | None = None,
) -> EfficientAttention:
    """Makes efficient attention (arXiv:1812.01243), linear in time and memory.

    Args:
      unidirectional: always causal.
      blindspot_size: for causal attention: size of the buckets; a query sees complete earlier
        buckets, and outputs of the first bucket are zero. 1 means all positions up to the query's
        own.
      scale_queries: multiply the output of bidirectional attention by ``D^(-1/2)``, as in
        linear-attention-transformer.
      implementation: of :func:`fast_attention.linear_attention`; "reference" supports forward mode.

    Returns:
      An ``attention_fn`` that also decodes.

    Raises:
      ValueError: for a ``blindspot_size`` below 1 or an unknown implementation.
    """
    implementation_names(implementation)
    return EfficientAttention(
        unidirectional,
        check_count("blindspot_size", blindspot_size),
        scale_queries,
        implementation,
    )
