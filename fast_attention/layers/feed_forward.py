"""The position-wise part of a Transformer block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array, Float
from fast_attention.layers.linear import Linear


def _squared_relu(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": functools.partial(jax.nn.gelu, approximate=True),
        "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "squared_relu": _squared_relu,
    }
)
"""Activation functions by name; "gelu" is the tanh approximation, Flax's default."""


class FeedForward(nnx.Module):
    """``activation(x W_1 + b_1) W_2 + b_2`` with dropout after each of the two.

    Attributes:
      activation: Name of the activation, a key of `ACTIVATIONS`.
      up: First dense layer, M to the hidden width.
      down: Second dense layer, back to M.
      dropout: Applied to the activations and to the output.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: str = "gelu",
        dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws Xavier-uniform kernels; biases start at zero.

        Args:
          features: M, of inputs and outputs.
          hidden_features: Width between the two layers.
          activation: A key of `ACTIVATIONS`.
          dropout_rate: Probability to drop an activation or an output.
          dtype: To compute in; None is that of inputs and parameters.
          rngs: Source of the parameters.

        Raises:
          ValueError: At an unknown activation.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}."
            )
        self.activation = activation
        kernel_init = nnx.initializers.xavier_uniform()
        self.up = Linear(features, hidden_features, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.down = Linear(
            hidden_features, features, kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self,
        x: Float[Array, "*B M"],
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*B M"]:
        """Applies the layer to each position by itself.

        Args:
          x: ``[*B, M]``.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[*B, M]``.
        """
        hidden = ACTIVATIONS[self.activation](self.up(x))
        hidden = self.dropout(hidden, deterministic=deterministic, rngs=rngs)
        return self.dropout(self.down(hidden), deterministic=deterministic, rngs=rngs)
