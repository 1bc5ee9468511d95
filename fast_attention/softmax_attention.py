"""Exact softmax attention: the baseline, with the interface of the linear mechanisms.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D) + bias_ij) v_j        (arXiv:1706.03762)

Memory is linear in the length, see :mod:`fast_attention.mechanisms.softmax.blocks`.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head
width, V value width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.checks import mismatch
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.softmax.blocks import Choices, Extras, blocked_attention, run_bounds
from fast_attention.recipes import attention_factory


class KVCache(NamedTuple):
    """Keys and values seen so far: the decoding state of exact attention.

    Attributes:
      key: ``[*B, S, K, D]`` float32.
      value: ``[*B, S, K, V]`` float32.
      visible: ``[*B, S]`` bool, False in unused slots and at padding of a prompt.
      length: ``[*B]`` int32, the number of used slots, including padding.
    """

    key: Float[Array, "*B S K D"]
    value: Float[Array, "*B S K V"]
    visible: Bool[Array, "*B S"]
    length: Int[Array, "*B"]


@dataclasses.dataclass(frozen=True, eq=False)
class SoftmaxAttention(AttentionFn):
    """Exact attention as an ``attention_fn``, from :func:`make_softmax_attention`.

    Attributes:
      unidirectional: position t sees keys 0..t, whatever the caller's ``is_causal`` is.
    """

    unidirectional: bool = False

    mechanism = "Exact attention"
    forward_mode = "nnx.dot_product_attention has it"

    @property
    def takes(self) -> Takes:
        """Any mask and bias."""
        return Takes(mask="pairs", bias="pairs", dropout="weights", symbolic_lengths=True)

    def attend(self, call: Call) -> Float[Array, "*B T H V"]:
        """Attends in memory linear in the length."""
        call = call.without_hidden()
        mask, key_mask = call.pairs()
        first = last = None
        if call.segment_ids is not None:
            first, last = run_bounds(call.segment_ids)
            last = None if call.causal else last
        key, rate, broadcast = call.dropout or (None, 0.0, True)
        return blocked_attention(
            call.query,
            call.key,
            call.value,
            Extras(call.bias, mask, key_mask, first, last, key),
            Choices(call.causal, rate, broadcast, call.precision),
        )

    def start(self, sizes: StateSizes) -> KVCache:
        """Makes an empty cache with room for ``max_length`` tokens."""
        if sizes.max_length is None:
            raise mismatch("max_length", "the number of tokens that the cache will hold", None)
        slots = (*sizes.batch_shape, sizes.max_length)
        return KVCache(
            key=jnp.zeros((*slots, sizes.num_kv_heads, sizes.head_dim), sizes.dtype),
            value=jnp.zeros((*slots, sizes.num_kv_heads, sizes.value_dim), sizes.dtype),
            visible=jnp.zeros(slots, bool),
            length=jnp.zeros(sizes.batch_shape, jnp.int32),
        )

    def read(self, state: KVCache, call: Call) -> tuple[Float[Array, "*B T H V"], KVCache]:
        """Appends the new tokens to the cache and attends to it causally.

        Padding takes a slot and is never seen. If the cache is too short, ValueError is raised; if
        its length is not known during tracing, the output is NaN instead.
        """
        call = call.without_hidden()
        query, batch = call.query, call.query.shape[:-3]
        room, new = state.key.shape[-3], call.key.shape[-3]
        used = state.length
        if new > room or not isinstance(used, Tracer) and int(np.max(used)) + new > room:
            raise ValueError(
                f"{new} new tokens do not fit a cache of {room}: make it with a larger max_length."
            )
        visible = jnp.ones((*batch, new), bool) if call.key_mask is None else call.key_mask[..., 0]

        def append(cache: Array, update: Array) -> Array:
            trailing = cache.shape[len(batch) :]
            rows = jax.vmap(lambda x, new, at: lax.dynamic_update_slice_in_dim(x, new, at, 0))
            flat = (cache.reshape(-1, *trailing), update.reshape(-1, *update.shape[len(batch) :]))
            out = rows(flat[0], flat[1].astype(cache.dtype), used.reshape(-1))
            return out.reshape(cache.shape)

        state = KVCache(
            key=append(state.key, call.key),
            value=append(state.value, call.value),
            visible=append(state.visible, visible),
            length=used + new,
        )
        out = blocked_attention(
            query,
            state.key.astype(query.dtype),
            state.value.astype(query.dtype),
            Extras(key_mask=state.visible, first_query=used),
            Choices(causal=True, precision=call.precision),
        )
        fits = (state.length <= room)[..., None, None, None]
        return jnp.where(fits, out, jnp.nan).astype(query.dtype), state


@attention_factory
def make_softmax_attention(unidirectional: bool = False) -> SoftmaxAttention:
    """Makes exact attention.

    Args:
      unidirectional: always causal.

    Returns:
      An ``attention_fn`` that also decodes with a :class:`KVCache`.
    """
    return SoftmaxAttention(unidirectional)
