"""One layer of a Transformer: attention, then feed-forward, each around a residual stream.

Shape letters: B batch, T length, M features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.layers.feed_forward import FeedForward
from fast_attention.layers.multi_head import MultiHeadAttention
from fast_attention.layers.token_shift import last_visible, shift_tokens, starts_of_runs


class BlockState(NamedTuple):
    """What a block remembers of the tokens so far.

    Attributes:
      attention: The state of its attention.
      attention_input: ``[B, M]``, what came last out of the norm before attention; None without
        token shift.
      feed_forward_input: The same before the feed-forward part.
    """

    attention: Any
    attention_input: Array | None
    feed_forward_input: Array | None


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))`` (pre-norm).

    Attributes:
      attention_norm, feed_forward_norm: Layer norms.
      attention: `MultiHeadAttention`.
      feed_forward: `FeedForward`.
      dropout: Applied to what attention adds.
      shift_tokens: Whether half of the channels into each part come from the position before.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        *,
        qkv_features: int | None = None,
        num_kv_heads: int | None = None,
        attention_fn: Callable[..., Array] | None = None,
        causal: bool = False,
        rotary: bool = False,
        shift_tokens: bool = False,
        activation: str = "gelu",
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters; the arguments are those of the two parts.

        Args:
          features: M.
          num_heads: Of attention.
          hidden_features: Of the feed-forward part.
          qkv_features: Of all heads together, by default M.
          num_kv_heads: By default `num_heads`.
          attention_fn: By default exact attention.
          causal: Makes attention causal, whatever was bound.
          rotary: Rotate queries and keys by their positions.
          shift_tokens: Half of the channels into each part come from the position before; for
            causal layers.
          activation: Of the feed-forward part.
          dropout_rate: Of what the two parts add, and between the feed-forward layers.
          attention_dropout_rate: Of attention weights.
          dtype: To compute in; None is that of inputs and parameters.
          rngs: Source of the parameters and projections.
        """
        if shift_tokens and not causal:
            raise ValueError(
                "shift_tokens looks one position back and is for causal layers; got causal=False."
            )
        self.features = features
        self.shift_tokens = shift_tokens
        self.attention_norm = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.attention = MultiHeadAttention(
            features,
            num_heads,
            qkv_features=qkv_features,
            num_kv_heads=num_kv_heads,
            attention_fn=attention_fn,
            causal=causal,
            rotary=rotary,
            dropout_rate=attention_dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(dropout_rate)
        self.feed_forward_norm = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(
            features,
            hidden_features,
            activation=activation,
            dropout_rate=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T M"]:
        """Applies the layer; the arguments are those of `MultiHeadAttention`."""
        starts = starts_of_runs(segment_ids, key_mask) if self.shift_tokens else None
        attended = self.attention(
            self._shift(self.attention_norm(x), starts),
            positions=positions,
            segment_ids=segment_ids,
            key_mask=key_mask,
            deterministic=deterministic,
            rngs=rngs,
        )
        x = x + self.dropout(attended, deterministic=deterministic, rngs=rngs)
        hidden = self._shift(self.feed_forward_norm(x), starts)
        return x + self.feed_forward(hidden, deterministic=deterministic, rngs=rngs)

    def init_state(self, batch_size: int, max_length: int) -> BlockState:
        """Makes the state before the first token, see `MultiHeadAttention.init_state`."""
        before = None
        if self.shift_tokens:
            before = jnp.zeros((batch_size, self.features), self.attention_norm.dtype)
        return BlockState(self.attention.init_state(batch_size, max_length), before, before)

    def prefill(
        self,
        state: BlockState,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M"], BlockState]:
        """Applies the layer to T new tokens per row, see `MultiHeadAttention.prefill`."""
        attended, attention, attention_input = self._prefill_attention(
            state, x, positions, key_mask
        )
        x = x + attended
        hidden, feed_forward_input = self._shift_on(
            self.feed_forward_norm(x), state.feed_forward_input, key_mask
        )
        new = BlockState(attention, attention_input, feed_forward_input)
        return x + self.feed_forward(hidden), new

    def step(
        self,
        state: BlockState,
        x: Float[Array, "B M"],
        *,
        positions: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B M"], BlockState]:
        """Applies the layer to one new token per row, see `MultiHeadAttention.step`."""
        hidden, attention_input = self._shift_one(self.attention_norm(x), state.attention_input)
        attended, attention = self.attention.step(state.attention, hidden, positions=positions)
        x = x + attended
        hidden, feed_forward_input = self._shift_one(
            self.feed_forward_norm(x), state.feed_forward_input
        )
        new = BlockState(attention, attention_input, feed_forward_input)
        return x + self.feed_forward(hidden), new

    def _prefill_attention(
        self, state: BlockState, x: Array, positions: Array | None, key_mask: Array | None
    ) -> tuple[Array, Any, Array | None]:
        hidden, attention_input = self._shift_on(
            self.attention_norm(x), state.attention_input, key_mask
        )
        attended, attention = self.attention.prefill(
            state.attention, hidden, positions=positions, key_mask=key_mask
        )
        return attended, attention, attention_input

    def _shift(self, x: Array, starts: Array | None) -> Array:
        return shift_tokens(x, starts=starts) if self.shift_tokens else x

    def _shift_on(
        self, x: Array, before: Array | None, key_mask: Array | None
    ) -> tuple[Array, Array | None]:
        """Shifts tokens that follow ``before``; padding may stand on either side."""
        if before is None:
            return x, None
        before = before.astype(x.dtype)
        shifted = shift_tokens(x, starts=starts_of_runs(None, key_mask), before=before)
        return shifted, last_visible(x, key_mask, before)

    def _shift_one(self, x: Array, before: Array | None) -> tuple[Array, Array | None]:
        if before is None:
            return x, None
        return shift_tokens(x[:, None], before=before.astype(x.dtype))[:, 0], x
