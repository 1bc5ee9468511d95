"""A language model: embeddings, a stack of residual layers, a final norm and logits.

Shape letters: B batch, T length, M features of the stack, E width of the embeddings, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.layers.dropout import check_rngs
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.linear import xavier_linear
from fast_attention.layers.masked_tokens import drop_masked_tokens
from fast_attention.layers.norms import make_norm
from fast_attention.layers.positions import sinusoids
from fast_attention.layers.stack.stack import Stack
from fast_attention.mesh.meshes import lay_activations, lay_whole_rows
from fast_attention.models.config import LanguageModelConfig
from fast_attention.models.logit_transform import Transform
from fast_attention.models.position_tables import make_positions


class DecodeState(NamedTuple):
    """The decoding state of a causal language model.

    Attributes:
      layers: The state of the stack.
      positions: ``[B]`` int32, the position of the next token of each row.
    """

    layers: tuple[Any, ...]
    positions: Int[Array, " B"]


class LanguageModel(nnx.Module):
    """A language model, causal or bidirectional, with any stack.

    Attributes:
      config: Its shape.
      embed: Embedding of tokens.
      positions: `LearnedPositions` or `AxialPositions`, or None.
      dropout: Applied to the embeddings.
      project_in, project_out: Dense layers between embeddings and stack, or None.
      stack: The layers.
      norm: Final norm, or identity.
      embed_norm: Norm of the embeddings, or None.
      transform: `Transform` before the logits, or None.
      head: Dense layer to the logits, or None if token embeddings are used.
      mesh: The mesh of activations, see `fast_attention.models.on_mesh`; None means one device, or
        that the compiler decides.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        """Draws the parameters, and a projection for each layer that needs one.

        Args:
          config: Shape of the model.
          rngs: Source of parameters and projections.
        """
        self.config: Any = config
        self.shape = config
        self.mesh: Mesh | None = None
        dtype, features = config.dtype, config.stack.features
        width = config.embedding_features
        self.embed = nnx.Embed(
            config.vocab_size,
            width,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            rngs=rngs,
        )
        self.positions = make_positions(config, rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)

        linear = functools.partial(xavier_linear, dtype=dtype, rngs=rngs)

        self.project_in = None if width == features else linear(width, features)
        self.stack = Stack(config.stack, dtype=dtype, rngs=rngs)
        unasked = config.logits == "none" and config.norm_before_projection
        self.project_out = None if width == features or unasked else linear(features, width)
        norm = config.final_norm
        norm_width = features if config.norm_before_projection else width
        self.norm = make_norm(norm.kind, norm_width, epsilon=norm.epsilon, dtype=dtype, rngs=rngs)
        self.head = (
            linear(width, config.vocab_size, dtype=None) if config.logits == "dense" else None
        )
        entry = config.embed_norm
        self.embed_norm = nnx.data(
            entry and make_norm(entry.kind, width, epsilon=entry.epsilon, dtype=dtype, rngs=rngs)
        )
        self.transform = nnx.data(config.transform and Transform(config, rngs=rngs))

    @modules_run_on_auto_axes
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        context: Float[Array, "B S N"] | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B T T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes the logits of every position.

        Args:
          tokens: ``[B, T]`` ids.
          positions: ``[B, T]``, by default 0, 1, ...; packed rows start again in each sequence.
          segment_ids: ``[B, T]``; packed sequences are runs of equal ids and do not attend to each
            other.
          key_mask: ``[B, T]``; positions where it is False (padding) are not seen.
          context: ``[B, S, N]``, a second sequence, for stacks that attend to one.
          context_mask: ``[B, S]``; context positions where it is False are not seen.
          mask: ``[B, T, T]``; position t sees s where it is True, for attention that supports such
            masks (exact, LSH); others raise an error.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          float32 ``[B, T, V]``; without logits in the configuration, the result of `encode`.

        Raises:
          ValueError: For more tokens than learned positions, or dropout without `rngs`.
        """
        encoded = self.encode(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            key_mask=key_mask,
            context=context,
            context_mask=context_mask,
            mask=mask,
            deterministic=deterministic,
            rngs=rngs,
        )
        return self._logits(encoded)

    @modules_run_on_auto_axes
    def encode(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        context: Float[Array, "B S N"] | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B T T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T M"]:
        """Computes the representation before the logits: the output of the final norm.

        The arguments are those of a call.

        Returns:
          ``[B, T, M]`` in the dtype of the configuration; the width is that of the embeddings if
          the projection comes before the norm.
        """
        check_rngs(self.dropout.rate, deterministic, rngs)
        positions = self._number(tokens) if positions is None else positions
        inputs = Inputs(positions, segment_ids, key_mask, context, context_mask, mask)
        x = self._embed(tokens, inputs)
        x = self._enter(self.dropout(x, deterministic=deterministic, rngs=rngs))
        given: dict[str, Any] = inputs._asdict()
        return self._leave(self.stack(x, **given, deterministic=deterministic, rngs=rngs))

    @modules_run_on_auto_axes
    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        layers: Sequence[int | Literal["last"]],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        context: Float[Array, "B S N"] | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B T T"] | None = None,
    ) -> list[Float[Array, "B T M"]]:
        """Computes the representations of selected layers, without dropout.

        Args:
          tokens: ``[B, T]`` ids.
          layers: 0 is the embedding as it enters the stack, i the stream after block i, negative
            numbers count from the last block; "last" is the result of `encode`, the output of the
            final norm.
          positions: As for a call.
          segment_ids: As for a call.
          key_mask: As for a call.
          context: As for a call.
          context_mask: As for a call.
          mask: As for a call.

        Returns:
          ``[B, T, M]`` for each of `layers`, in their order.

        Raises:
          ValueError: For a layer that the stack does not have.
        """
        blocks = len(self.stack.blocks)
        for layer in layers:
            if layer != "last" and not -blocks - 1 <= layer <= blocks:
                raise ValueError(
                    f"layers are 0 (the embedding) .. {blocks}, -1 .. {-blocks - 1} from the end, "
                    f"or 'last'; got {layer!r}."
                )
        positions = self._number(tokens) if positions is None else positions
        inputs = Inputs(positions, segment_ids, key_mask, context, context_mask, mask)
        states = self.stack.hidden_states(self._enter(self._embed(tokens, inputs)), inputs)
        return [self._leave(states[-1]) if layer == "last" else states[layer] for layer in layers]

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one."""
        return self.stack.causal

    @property
    def can_decode(self) -> bool:
        """Whether the model can read token by token."""
        return self.stack.can_decode

    @modules_run_on_auto_axes
    def init_state(
        self,
        batch_size: int,
        max_length: int,
        *,
        context: Float[Array, "B S N"] | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
    ) -> DecodeState:
        """Makes the state before the first token.

        Args:
          batch_size: B.
          max_length: Maximum number of tokens, including padding; constant-size states do not
            depend on it.
          context: A second sequence, for stacks that attend to one.
          context_mask: Mask of the context.

        Returns:
          An empty `DecodeState`.

        Raises:
          TypeError: If the attention function cannot decode.
          ValueError: If the model is not causal, or has fewer learned positions.
        """
        self._check_length(max_length)
        inputs = Inputs(context=context, context_mask=context_mask)
        return DecodeState(
            layers=self.stack.init_state(batch_size, max_length, inputs),
            positions=jnp.zeros(batch_size, jnp.int32),
        )

    @modules_run_on_auto_axes
    def prefill(
        self,
        state: DecodeState,
        tokens: Int[Array, "B T"],
        key_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], DecodeState]:
        """Reads T tokens per row at once.

        Args:
          state: The state of earlier tokens.
          tokens: ``[B, T]`` ids.
          key_mask: ``[B, T]``; False is padding, on either side: it is not attended to, has no
            position, and its logits are meaningless.

        Returns:
          float32 logits ``[B, T, V]`` and the next state.
        """
        if key_mask is None:
            count = jnp.ones(tokens.shape, jnp.int32)
        else:
            count = key_mask.astype(jnp.int32)
        seen = jnp.cumsum(count, axis=1)
        positions = state.positions[:, None] + jnp.maximum(seen - 1, 0)
        inputs = Inputs(positions=positions, key_mask=key_mask)
        x = self._enter(self._embed(tokens, inputs))
        x, layers = self.stack.prefill(state.layers, x, inputs)
        state = DecodeState(layers, state.positions + seen[:, -1])
        return self._logits(self._leave(x)), state

    @modules_run_on_auto_axes
    def step(
        self, state: DecodeState, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], DecodeState]:
        """Reads one token per row.

        Args:
          state: The state of earlier tokens.
          tokens: ``[B]`` ids.

        Returns:
          float32 logits ``[B, V]`` of the next token, and the next state.
        """
        inputs = Inputs(positions=state.positions)
        x = self._enter(self._embed(tokens, inputs))
        x, layers = self.stack.step(state.layers, x, inputs)
        return self._logits(self._leave(x)), DecodeState(layers, state.positions + 1)

    def _embed(self, tokens: Array, inputs: Inputs) -> Array:
        x, dropout = self._look_up(tokens), self.shape.token_dropout
        if dropout is not None:
            x = drop_masked_tokens(
                x,
                tokens == dropout.mask_token,
                dropout.rate,
                key_mask=inputs.key_mask,
                segment_ids=inputs.segment_ids,
            )
        positions = inputs.positions
        assert positions is not None
        if self.positions is not None:
            x = x + self.positions(positions).astype(x.dtype)
        elif self.shape.positions in ("sinusoidal", "concatenated"):
            concatenated = self.shape.positions == "concatenated"
            encoded = sinusoids(positions, x.shape[-1], concatenated=concatenated)
            x = x + encoded.astype(x.dtype)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _look_up(self, tokens: Array) -> Array:
        if self.mesh is None:
            return self.embed(tokens)
        # Left to choose, the compiler may gather what was looked up, which grows with the length.
        table = lay_whole_rows(self.embed.embedding[...], self.mesh)
        return jnp.take(table, tokens, axis=0).astype(self.shape.dtype)

    def _number(self, tokens: Array) -> Array:
        self._check_length(tokens.shape[1])
        return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

    def _enter(self, x: Array) -> Array:
        x = x if self.project_in is None else self.project_in(x)
        return lay_activations(x, self.mesh)

    def _leave(self, x: Array) -> Array:
        if self.project_out is None or self.shape.norm_before_projection:
            return self.norm(x)
        return self.norm(self.project_out(x))

    def _logits(self, x: Array) -> Array:
        if self.shape.logits == "none":
            return x
        if self.project_out is not None and self.shape.norm_before_projection:
            x = self.project_out(x)
        x = x.astype(jnp.float32)
        if self.transform is not None:
            x = self.transform(x)
        if self.head is not None:
            return self.head(x)
        table = self.embed.embedding[...].astype(jnp.float32)
        if self.shape.logits == "normalized":
            table = table / jnp.maximum(jnp.linalg.norm(table, axis=-1, keepdims=True), 1e-12)
        logits = jnp.einsum("...m,vm->...v", x, table)
        if self.transform is not None:
            logits = self.transform.add_bias(logits)
        return logits * x.shape[-1] ** -0.5 if self.shape.logits == "scaled" else logits

    def _check_length(self, length: int) -> None:
        if self.positions is not None and length > self.shape.max_len:
            raise ValueError(
                f"{length} tokens are more than the max_len={self.shape.max_len} learned "
                "positions: use shorter inputs, a larger max_len, or positions='rotary', "
                "'sinusoidal' or 'none'."
            )
