"""The mechanism for Flax, with decoding.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, V value width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Takes
from fast_attention.recipes import recorded
from tests.design.uniform.op import uniform_attention


class UniformState(NamedTuple):
    """Sum of the values ``[*B, K, V]`` and number of keys ``[*B, K]`` so far."""

    total: Any
    count: Any


@dataclasses.dataclass(frozen=True, eq=False)
class UniformAttention(AttentionFn):
    """The average of visible values, with the signature Flax calls."""

    unidirectional: bool = False

    mechanism = "Uniform attention"
    forward_mode = "every way has it"

    @property
    def takes(self):
        """Masks and biases of keys, dropout of keys."""
        return Takes()

    def attend(self, call):
        """Attends ``[*B, T, H, V]``."""
        length, keys = call.query.shape[-3], call.key.shape[-3]
        seen = jnp.tri(length, keys, dtype=bool) if call.causal else jnp.ones((length, keys), bool)
        seen = jnp.expand_dims(seen, tuple(range(call.query.ndim - 2)))
        if call.segment_ids is not None:
            ids = call.segment_ids[..., None, :]
            seen = seen & (ids[..., None] == ids[..., None, :])
        if call.key_mask is not None:
            seen = seen & jnp.swapaxes(call.key_mask, -1, -2)[..., None, :]
        call = call.without_hidden()
        out = uniform_attention(call.drop_keys(), seen, call.key_bias, call.precision)
        return jnp.repeat(out, call.query.shape[-2] // out.shape[-2], axis=-2)

    def start(self, sizes):
        """The state before the first token."""
        shape = (*sizes.batch_shape, sizes.num_kv_heads)
        total = jnp.zeros((*shape, sizes.value_dim), sizes.dtype)
        return UniformState(total, jnp.zeros(shape, sizes.dtype))

    def read(self, state, call):
        """Reads T tokens."""
        shape = call.value.shape[:-1]
        visible = jnp.ones(shape) if call.key_mask is None else call.key_mask
        value = jnp.where(visible[..., None] > 0, call.value, 0)
        total = state.total[..., None, :, :] + jnp.cumsum(value, axis=-3)
        count = state.count[..., None, :] + jnp.cumsum(jnp.broadcast_to(visible, shape), axis=-2)
        out = total / jnp.maximum(count, 1)[..., None]
        out = jnp.repeat(out, call.query.shape[-2] // out.shape[-2], axis=-2)
        after = UniformState(total[..., -1, :, :], count[..., -1, :])
        return out.astype(call.query.dtype), jax.tree.map(jnp.asarray, after)


@recorded
def make_uniform_attention(unidirectional: bool = False) -> UniformAttention:
    """Makes uniform attention.

    Args:
      unidirectional: always causal.
    """
    return UniformAttention(unidirectional)
