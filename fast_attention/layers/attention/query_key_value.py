"""Queries, keys and values of a sequence, of learned memory and of a second sequence.

Shape letters: B batch, T length, S keys, H heads, K key/value heads, D head width, M features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.layers.attention.config import AttentionConfig
from fast_attention.layers.attention.query_key_norm import UnitQueryKey
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.linear import Linear, xavier_linear


class QueryKeyValue(nnx.Module):
    """The dense layers in front of attention.

    Attributes:
      config: Shape of the attention layer.
      query, key, value: Dense layers; no key with shared_qk.
      query_norm, key_norm: With qk_norm="rms", shared by the heads.
      unit_norm: Of both, with qk_norm="unit".
      memory: Learned vectors ``[n, M]``, or None.
    """

    def __init__(
        self, features: int, config: AttentionConfig, *, dtype: Any = None, rngs: nnx.Rngs
    ):
        """Draws Xavier-uniform kernels.

        Args:
          features: M.
          config: Shape of the attention layer.
          dtype: To compute in; None is that of inputs and parameters.
          rngs: Source of the parameters.
        """
        self.config = config
        width, bias = config.head_dim, config.use_bias
        source = config.context_features if config.context == "cross" else None
        source = features if source is None else source

        def linear(inputs: int, heads: int) -> Linear:
            return xavier_linear(inputs, heads * width, use_bias=bias, dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(width, dtype=dtype, rngs=rngs)

        self.query = linear(features, config.num_heads)
        self.key = None if config.shared_qk else linear(source, config.kv_heads)
        self.value = linear(source, 1 if config.one_value_head else config.kv_heads)
        rms = config.qk_norm == "rms"
        self.query_norm = norm() if rms else None
        self.key_norm = norm() if rms and not config.shared_qk else None
        self.unit_norm = UnitQueryKey(config.kv_heads) if config.qk_norm == "unit" else None
        self.memory = nnx.data(None)
        if config.memory:
            drawn = jax.random.normal(rngs.params(), (config.memory, features))
            self.memory = nnx.Param(drawn)

    def __call__(
        self, x: Float[Array, "*B M"], context: Array | None = None, *, memory: bool = True
    ) -> tuple[Float[Array, "*B H D"], Float[Array, "*B K D"], Float[Array, "*B K D"]]:
        """Projects.

        Args:
          x: ``[B, T, M]``; without memory and context also ``[B, M]``.
          context: ``[B, S, N]``, attended to instead of x (cross), or behind it (append).
          memory: Append the memory, if there is one.

        Returns:
          Queries of x, and keys and values of x, memory and context, in this order.
        """
        if self.config.context == "cross":
            return self.queries(x), *self.keys_values(context)
        source = [x]
        if memory and self.memory is not None:
            source.append(self._memory_of(len(x)).astype(x.dtype))
        if context is not None:
            source.append(context.astype(x.dtype))
        if len(source) == 1:
            key, value = self.keys_values(x)
            return (key if self.key is None else self.queries(x)), key, value
        key, value = self.keys_values(jnp.concatenate(source, axis=1))
        query = key[:, : x.shape[1]] if self.key is None else self.queries(x)
        return query, key, value

    def queries(self, x: Float[Array, "*B M"]) -> Float[Array, "*B H D"]:
        """Projects to queries."""
        return self._normalized(self._heads(self.query(x)), self.query_norm)

    def keys_values(self, x: Any) -> tuple[Float[Array, "*B K D"], Float[Array, "*B K D"]]:
        """Projects to keys and values."""
        if self.key is None:
            key = self.queries(x)
        else:
            key = self._normalized(self._heads(self.key(x)), self.key_norm)
        value = self._heads(self.value(x))
        if self.config.one_value_head:
            value = jnp.broadcast_to(value, key.shape)
        return key, value

    def memory_keys_values(self, batch_size: int) -> tuple[Array, Array]:
        """Keys and values of the memory alone, ``[B, n, K, D]``."""
        return self.keys_values(self._memory_of(batch_size))

    def key_mask(
        self, inputs: Inputs, key_shape: tuple[int, ...], length: int
    ) -> Bool[Array, "B S"] | None:
        """The mask of x, memory and context together; None where all are seen."""
        if inputs.key_mask is None and inputs.context_mask is None:
            return None
        batch, key_length = key_shape
        sizes = (length, self.config.memory, key_length - length - self.config.memory)
        masks = (inputs.key_mask, None, inputs.context_mask)
        parts = [
            jnp.ones((batch, size), bool) if mask is None else mask
            for size, mask in zip(sizes, masks, strict=True)
            if size
        ]
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.config.head_dim, self.config.head_dim)

    def _normalized(self, x: Array, norm: nnx.RMSNorm | None) -> Array:
        if self.unit_norm is not None:
            return self.unit_norm(x)
        return x if norm is None else norm(x)

    def _memory_of(self, batch_size: int) -> Array:
        assert self.memory is not None
        return jnp.broadcast_to(self.memory[...][None], (batch_size, *self.memory.shape))
