"""Linformer with its dense layers: attention up to a fixed length.

Shape letters: B batch, T queries, S keys, L keys at most, R projected keys, M features, N context
features, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.dropout import check_rate, dropout_options
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.linear import xavier_linear
from fast_attention.layers.sublayer_part import SublayerPart
from fast_attention.mechanisms.linformer.op import linformer_attention, refuse_masks


@dataclasses.dataclass(frozen=True)
class LinformerConfig:
    """Shape of a `LinformerAttention`.

    Attributes:
      num_heads: H.
      length: L, maximum length of the input or, with `cross`, of the context.
      projected: R, number of mixtures of positions.
      head_dim: D, by default M / H.
      cross: Keys and values come from a context.
      context_features: N, by default M.
      one_kv_head: All heads share one head of keys and values.
      share_kv: Keys and values share both projections.
      use_bias: Whether query, key and value have biases.
      use_out_bias: Whether the output has a bias.
      dropout_rate: Dropout rate of attention weights.
    """

    num_heads: int
    length: int
    projected: int = 256
    head_dim: int | None = None
    cross: bool = False
    context_features: int | None = None
    one_kv_head: bool = False
    share_kv: bool = False
    use_bias: bool = False
    use_out_bias: bool = True
    dropout_rate: float = 0.0

    def __post_init__(self):
        """Checks sizes and the rate.

        Raises:
          ValueError: If a size is below 1 or the rate out of range.
        """
        for name in ("num_heads", "length", "projected"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_rate(self.dropout_rate)


class LinformerAttention(nnx.Module, SublayerPart):
    """Attention to learned mixtures of L positions, of the input itself or of a context.

    Attributes:
      config: Its shape.
      query, key, value, out: Dense layers; `value` is None if it is shared with `key`.
      key_projection: Parameter ``[L, R]``.
      value_projection: Parameter ``[L, R]``, None if it is shared.
    """

    def __init__(
        self, features: int, config: LinformerConfig, *, dtype: Any = None, rngs: nnx.Rngs
    ):
        """Draws Xavier-uniform kernels and uniform projections.

        Args:
          features: M, of inputs and outputs.
          config: Shape of the layer.
          dtype: Dtype of the computation; None is that of inputs and parameters.
          rngs: Source of the parameters.

        Raises:
          ValueError: If `head_dim` is not given and `num_heads` does not divide `features`.
        """
        if config.head_dim is None and features % config.num_heads:
            raise ValueError(
                f"features={features} must be a multiple of num_heads={config.num_heads}, or give "
                "head_dim."
            )
        self.config = config
        self.head_dim = config.head_dim or features // config.num_heads
        context_features = config.context_features or features
        inner = config.num_heads * self.head_dim
        outer = self.head_dim if config.one_kv_head else inner

        linear = functools.partial(xavier_linear, dtype=dtype, rngs=rngs)

        def projection() -> nnx.Param:
            limit = config.projected**-0.5
            shape = (config.length, config.projected)
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit))

        def unless_shared(make: Callable[[], Any]) -> Any:
            return nnx.data(None if config.share_kv else make())

        bias = config.use_bias
        self.query = linear(features, inner, use_bias=bias)
        self.key = linear(context_features, outer, use_bias=bias)
        self.value = unless_shared(lambda: linear(context_features, outer, use_bias=bias))
        self.out = linear(inner, features, use_bias=config.use_out_bias)
        self.key_projection = projection()
        self.value_projection = unless_shared(projection)

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
          context: ``[B, S, N]``, S <= L; only for a layer with `cross`.
          key_mask: Must be None, because a mixture of all positions cannot exclude one.
          segment_ids: Must be None.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[B, T, M]``.

        Raises:
          ValueError: For more keys than L, a mask, a context that is missing or not expected, or
            dropout without `rngs`.
        """
        refuse_masks(key_mask if segment_ids is None else segment_ids, causal=False)
        if self.config.cross != (context is not None):
            expected = "needs a context" if self.config.cross else "takes no context"
            raise ValueError(f"Linformer with cross={self.config.cross} {expected}.")
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
            **dropout_options(self.config.dropout_rate, deterministic, rngs),
        )
        return self.out(jax.lax.collapse(out, -2))

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one of its own sequence."""
        return self.config.cross

    @property
    def can_decode(self) -> bool:
        """False: there is no state."""
        return False

    @property
    def reads_context(self) -> bool:
        """Whether keys and values are those of the context."""
        return self.config.cross

    def add(
        self, x: Float[Array, "B T M"], inputs: Inputs, *, choices: Any = None, **options: Any
    ) -> tuple[Float[Array, "B T M"], None]:
        """Attends; masks raise an error, see `SublayerPart.add`."""
        if self.config.cross:
            known: Any = {"context": inputs.context, "key_mask": inputs.context_mask}
            return self(x, **known, **options), None
        if inputs.mask is not None:
            raise ValueError("Linformer mixes all positions and does not support masks, got one.")
        known = {"key_mask": inputs.key_mask, "segment_ids": inputs.segment_ids}
        return self(x, **known, **options), None
