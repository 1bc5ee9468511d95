"""An encoder, and a decoder that attends to the encodings of another sequence.

Shape letters: B batch, S source length, T target length, M features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.models.generation import generate
from fast_attention.models.language_model import LanguageModel
from fast_attention.models.losses import cross_entropy


class EncoderDecoder(nnx.Module):
    """Sequence to sequence.

    Attributes:
      encoder: A bidirectional `LanguageModel`; its encodings are used.
      decoder: A causal `LanguageModel` whose stack attends to a context.
      ignore_index: Target tokens that are not predicted, such as padding.
      pad_value: Padding after the end of a generated sequence.
    """

    def __init__(
        self,
        encoder: LanguageModel,
        decoder: LanguageModel,
        *,
        ignore_index: int = 0,
        pad_value: int = 0,
        tie_embeddings: bool = False,
    ):
        """Joins two models.

        Args:
          encoder: See above.
          decoder: See above.
          ignore_index: Target tokens that are not predicted.
          pad_value: Padding after the end of a generated sequence.
          tie_embeddings: The decoder uses the token embedding of the encoder.

        Raises:
          ValueError: If the decoder is not causal, or tied embeddings differ in shape.
        """
        if not decoder.causal:
            raise ValueError(
                "The decoder must be causal; otherwise it would see the tokens that it predicts."
            )
        if tie_embeddings:
            shapes = encoder.embed.embedding.shape, decoder.embed.embedding.shape
            if shapes[0] != shapes[1]:
                raise ValueError(f"Embeddings of different shapes cannot be tied, got {shapes}.")
            decoder.embed = encoder.embed
        self.encoder = encoder
        self.decoder = decoder
        self.ignore_index = ignore_index
        self.pad_value = pad_value

    @modules_run_on_auto_axes
    def encode(
        self,
        source: Int[Array, "B S"],
        source_mask: Bool[Array, "B S"] | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B S M"]:
        """Encodes the source; padding (False in the mask) is not attended to."""
        return self.encoder.encode(
            source, key_mask=source_mask, deterministic=deterministic, rngs=rngs
        )

    @modules_run_on_auto_axes
    def __call__(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        source_mask: Bool[Array, "B S"] | None = None,
        target_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes the logits of the next token after every target token.

        Args:
          source: ``[B, S]`` ids.
          target: ``[B, T]`` ids.
          source_mask: ``[B, S]``, False is padding.
          target_mask: ``[B, T]``, False is padding.
          deterministic: No dropout.
          rngs: Source of dropout.

        Returns:
          float32 ``[B, T, V]``.
        """
        own: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        context = self.encode(source, source_mask, **own)
        return self.decoder(
            target, key_mask=target_mask, context=context, context_mask=source_mask, **own
        )

    @modules_run_on_auto_axes
    def loss(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        source_mask: Bool[Array, "B S"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Mean loss in nats of all target tokens after the first, without padding.

        Args:
          source: ``[B, S]`` ids.
          target: ``[B, T]`` ids, beginning with a start token and padded at the end; `ignore_index`
            is not predicted.
          source_mask: ``[B, S]``, False is padding.
          deterministic: No dropout.
          rngs: Source of dropout.

        Returns:
          float32 scalar, and the number of averaged tokens.
        """
        logits = self(
            source,
            jnp.maximum(target, 0)[:, :-1],
            source_mask=source_mask,
            deterministic=deterministic,
            rngs=rngs,
        )
        return cross_entropy(logits, target[:, 1:], target[:, 1:] != self.ignore_index)

    def generate(
        self,
        source: Int[Array, "B S"],
        prompt: Int[Array, "B P"],
        *,
        key: Array,
        max_new_tokens: int,
        source_mask: Bool[Array, "B S"] | None = None,
        **options: Any,
    ) -> Int[Array, "B N"]:
        """Generates targets, see `fast_attention.models.generate`.

        Args:
          source: ``[B, S]`` ids.
          prompt: ``[B, P]``, the beginning of the targets, at least a start token.
          key: Random key.
          max_new_tokens: N.
          source_mask: ``[B, S]``, False is padding.
          **options: Options of `generate`.

        Returns:
          int32 ``[B, N]``, the new tokens.
        """
        options = {"pad_token": self.pad_value} | options
        context = self.encode(source, source_mask)
        return generate(
            self.decoder,
            prompt,
            key=key,
            max_new_tokens=max_new_tokens,
            context=context,
            context_mask=source_mask,
            **options,
        )
