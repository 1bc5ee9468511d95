"""The Transformer: embeddings, pre-norm blocks, a final norm and logits over the vocabulary.

Shape letters: B batch, T length, M features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.layers.block import Block
from fast_attention.layers.linear import Linear
from fast_attention.layers.positions import LearnedPositions, sinusoids
from fast_attention.models.config import TransformerConfig


class DecodeState(NamedTuple):
    """What a causal Transformer remembers of the tokens so far.

    Attributes:
      layers: The state of each block's attention.
      positions: ``[B]`` int32, the position of the next token of each row.
    """

    layers: tuple[Any, ...]
    positions: Int[Array, " B"]


class Transformer(nnx.Module):
    """A language model, causal or bidirectional, around any attention function.

    Attributes:
      config: Its shape.
      embed: Embedding of tokens.
      positions: `LearnedPositions`, or None.
      dropout: Applied to the embeddings.
      blocks: The layers.
      norm: Final layer norm.
      head: Dense layer to the logits, or None with tied embeddings.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attention_fn: Callable[..., Array] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters, and a projection for each layer whose attention has one.

        Args:
          config: Shape of the model.
          attention_fn: What attends in every layer, called as ``nnx.dot_product_attention``;
            None is exact attention.
          rngs: Source of parameters and projections.
        """
        self.config = config
        dtype = config.dtype
        self.embed = nnx.Embed(
            config.vocab_size,
            config.emb_dim,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            rngs=rngs,
        )
        learned = config.positions == "learned"
        self.positions = LearnedPositions(config.max_len, config.emb_dim) if learned else None
        self.dropout = nnx.Dropout(config.dropout_rate)

        def build(rngs: nnx.Rngs) -> Block:
            return Block(
                config.emb_dim,
                config.num_heads,
                config.mlp_dim,
                qkv_features=config.qkv_dim,
                num_kv_heads=config.kv_heads,
                attention_fn=attention_fn,
                causal=config.causal,
                rotary=config.positions == "rotary",
                shift_tokens=config.shift_tokens,
                activation=config.activation,
                dropout_rate=config.dropout_rate,
                attention_dropout_rate=config.attention_dropout_rate,
                dtype=dtype,
                rngs=rngs,
            )

        self.blocks = _build_alike(build, config.num_layers, rngs)
        self.norm = nnx.LayerNorm(config.emb_dim, dtype=dtype, rngs=rngs)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                config.emb_dim,
                config.vocab_size,
                kernel_init=nnx.initializers.xavier_uniform(),
                rngs=rngs,
            )
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes the logits of every position.

        Args:
          tokens: ``[B, T]`` ids.
          positions: ``[B, T]``, by default 0, 1, ...; packed rows start again in each sequence.
          segment_ids: ``[B, T]``; packed sequences are runs of equal ids and do not see each
            other.
          key_mask: ``[B, T]``; positions where it is False (padding) are not seen.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          float32 ``[B, T, V]``.

        Raises:
          ValueError: For more tokens than learned positions, or dropout without `rngs`.
        """
        return self._logits(
            self.encode(
                tokens,
                positions=positions,
                segment_ids=segment_ids,
                key_mask=key_mask,
                deterministic=deterministic,
                rngs=rngs,
            )
        )

    def encode(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T M"]:
        """Computes the representation behind the logits: the output of the final norm.

        The arguments are those of a call.

        Returns:
          ``[B, T, M]`` in the dtype of the configuration.
        """
        if self.config.dropout_rate > 0 and not deterministic and rngs is None:
            raise ValueError(
                f"dropout_rate={self.config.dropout_rate} needs rngs=nnx.Rngs(...), or pass "
                "deterministic=True."
            )
        if positions is None:
            self._check_length(tokens.shape[1])
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = self._embed(tokens, positions)
        x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        for block in self.blocks:
            x = block(
                x,
                positions=positions,
                segment_ids=segment_ids,
                key_mask=key_mask,
                deterministic=deterministic,
                rngs=rngs,
            )
        return self.norm(x)

    def init_state(self, batch_size: int, max_length: int) -> DecodeState:
        """Makes the state before the first token.

        Args:
          batch_size: B.
          max_length: Tokens to make room for, padding included; constant-size states need none.

        Returns:
          An empty `DecodeState`.

        Raises:
          TypeError: If the attention function cannot decode.
          ValueError: If the model is not causal, or has fewer learned positions.
        """
        self._check_length(max_length)
        return DecodeState(
            layers=tuple(block.init_state(batch_size, max_length) for block in self.blocks),
            positions=jnp.zeros(batch_size, jnp.int32),
        )

    def prefill(
        self,
        state: DecodeState,
        tokens: Int[Array, "B T"],
        key_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], DecodeState]:
        """Reads T tokens per row at once.

        Args:
          state: What came before.
          tokens: ``[B, T]`` ids.
          key_mask: ``[B, T]``; False is padding, on either side: it is not seen, takes no
            position, and has meaningless logits.

        Returns:
          float32 logits ``[B, T, V]`` and the next state.
        """
        if key_mask is None:
            count = jnp.ones(tokens.shape, jnp.int32)
        else:
            count = key_mask.astype(jnp.int32)
        seen = jnp.cumsum(count, axis=1)
        positions = state.positions[:, None] + jnp.maximum(seen - 1, 0)
        x = self._embed(tokens, positions)
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer = block.prefill(layer, x, positions=positions, key_mask=key_mask)
            layers.append(layer)
        next_positions = state.positions + seen[:, -1]
        return self._logits(self.norm(x)), DecodeState(tuple(layers), next_positions)

    def step(
        self, state: DecodeState, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], DecodeState]:
        """Reads one token per row.

        Args:
          state: What came before.
          tokens: ``[B]`` ids.

        Returns:
          float32 logits ``[B, V]`` of the next token, and the next state.
        """
        x = self._embed(tokens, state.positions)
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer = block.step(layer, x, positions=state.positions)
            layers.append(layer)
        return self._logits(self.norm(x)), DecodeState(tuple(layers), state.positions + 1)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(positions).astype(x.dtype)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, self.config.emb_dim).astype(x.dtype)
        return x

    def _logits(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        if self.head is not None:
            return self.head(x)
        table = self.embed.embedding[...].astype(jnp.float32)
        return jnp.einsum("...m,vm->...v", x, table) * self.config.emb_dim**-0.5

    def _check_length(self, length: int) -> None:
        if self.positions is not None and length > self.config.max_len:
            raise ValueError(
                f"{length} tokens are more than the max_len={self.config.max_len} learned "
                "positions: use shorter inputs, a larger max_len, or positions='rotary', "
                "'sinusoidal' or 'none'."
            )


def _build_alike(
    build: Callable[[nnx.Rngs], nnx.Module], number: int, rngs: nnx.Rngs
) -> nnx.List[Any]:
    """Builds modules that differ in their random numbers alone.

    Each kind of parameter is drawn for all of them at once, which compiles in the time that one
    of them takes.
    """
    stacked = nnx.split_rngs(splits=number)(nnx.vmap(build))(rngs)
    graphdef, state = nnx.split(stacked)

    def take(index: int) -> nnx.Module:
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], state))

    return nnx.List([take(index) for index in range(number)])
