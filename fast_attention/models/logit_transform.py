"""The layers of BERT and ESM-2 between the stack and the logits.

Shape letters: B batch and length, M features, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.feed_forward import activation_of
from fast_attention.layers.linear import xavier_linear
from fast_attention.models.config import LanguageModelConfig


class Transform(nnx.Module):
    """``norm(activation(x W + b))`` before the logits, in float32; see `LogitTransform`.

    Attributes:
      dense: Dense layer.
      norm: Layer norm.
      bias: Bias of tied logits, ``[V]``; None if a dense layer computes the logits.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        """Draws a Xavier-uniform kernel; biases are zero."""
        width, transform = config.embedding_features, config.transform
        assert transform is not None
        self.activation = transform.activation
        self.dense = xavier_linear(width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=transform.epsilon, rngs=rngs)
        tied = config.logits == "tied"
        self.bias = nnx.data(nnx.Param(jnp.zeros(config.vocab_size)) if tied else None)

    def __call__(self, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """Transforms the output of the stack."""
        return self.norm(activation_of(self.activation)(self.dense(x)))

    def add_bias(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Adds the bias of tied logits."""
        assert self.bias is not None
        return logits + self.bias[...].reshape((1,) * (logits.ndim - 1) + (-1,))
