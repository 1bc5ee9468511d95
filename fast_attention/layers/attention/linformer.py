"""Linformer with its dense layers: attention up to a fixed length.

Shape letters: B batch, T queries, S keys, L keys at most, R projected keys, M features, N context
features, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.linear import Linear
from fast_attention.mechanisms.linformer.op import linformer_attention, refuse_masks


class LinformerAttention(nnx.Module):
    """Attention to learned mixtures of L positions, of the input itself or of a context.

    Attributes:
      query, key, value, out: Dense layers; `value` is None where it is shared with `key`.
      key_projection: Parameter ``[L, R]``.
      value_projection: Parameter ``[L, R]``, None where it is shared.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        length: int,
        projected: int = 256,
        *,
        head_dim: int | None = None,
        context_features: int | None = None,
        one_kv_head: bool = False,
        share_kv: bool = False,
        use_bias: bool = False,
        use_out_bias: bool = True,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws Xavier-uniform kernels and uniform projections.

        Args:
          features: M, of inputs and outputs.
          num_heads: H.
          length: L, the longest input or, where one is given, context.
          projected: R, mixtures of positions.
          head_dim: D, by default M / H.
          context_features: N, by default M.
          one_kv_head: All heads share one head of keys and values.
          share_kv: Values are the keys, by the same two projections.
          use_bias: Of query, key and value.
          use_out_bias: Of the output.
          dropout_rate: Of attention weights.
          dtype: To compute in; None is that of inputs and parameters.
          rngs: Source of the parameters.

        Raises:
          ValueError: If a size is below 1, or `num_heads` does not divide `features` where
            `head_dim` is not given.
        """
        sizes = {"num_heads": num_heads, "length": length, "projected": projected}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if head_dim is None and features % num_heads:
            raise ValueError(
                f"features={features} must be a multiple of num_heads={num_heads}, or give "
                "head_dim."
            )
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.head_dim = features // num_heads if head_dim is None else head_dim
        context_features = features if context_features is None else context_features
        inner, outer = num_heads * self.head_dim, self.head_dim * (1 if one_kv_head else num_heads)

        def linear(inputs: int, outputs: int, use_bias: bool) -> Linear:
            return Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                kernel_init=nnx.initializers.xavier_uniform(),
                dtype=dtype,
                rngs=rngs,
            )

        def projection() -> nnx.Param:
            limit = projected**-0.5
            shape = (length, projected)
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit))

        self.query = linear(features, inner, use_bias)
        self.key = linear(context_features, outer, use_bias)
        self.value = nnx.data(None if share_kv else linear(context_features, outer, use_bias))
        self.out = linear(inner, features, use_out_bias)
        self.key_projection = projection()
        self.value_projection = nnx.data(None if share_kv else projection())

    @modules_run_on_auto_axes
    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        context: Float[Array, "B S N"] | None = None,
        key_mask: None = None,
        segment_ids: None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T M"]:
        """Attends from x to itself, or to a context.

        Args:
          x: ``[B, T, M]``; T <= L unless there is a context.
          context: ``[B, S, N]``, S <= L.
          key_mask: Must be None: a mixture of positions cannot leave one out.
          segment_ids: Must be None.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[B, T, M]``.

        Raises:
          ValueError: For more keys than L, a mask, or dropout without `rngs`.
        """
        refuse_masks(key_mask if segment_ids is None else segment_ids, causal=False)
        drop = self.dropout_rate > 0 and not deterministic
        if drop and rngs is None:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} needs rngs=nnx.Rngs(...), or pass "
                "deterministic=True."
            )
        source = x if context is None else context

        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)

        key = heads(self.key(source))
        value = key if self.value is None else heads(self.value(source))
        mix = self.key_projection
        value_mix = mix if self.value_projection is None else self.value_projection
        out = linformer_attention(
            heads(self.query(x)),
            key,
            value,
            mix[...],
            value_mix[...],
            dropout_rng=rngs.dropout() if drop and rngs is not None else None,
            dropout_rate=self.dropout_rate if drop else 0.0,
            broadcast_dropout=False,
        )
        return self.out(jax.lax.collapse(out, -2))
