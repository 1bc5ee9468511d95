"""The position-wise part of a Transformer block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.linear import xavier_linear
from fast_attention.layers.sublayer_part import SublayerPart


def _squared_relu(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "celu": jax.nn.celu,
        "elu": jax.nn.elu,
        "gelu": functools.partial(jax.nn.gelu, approximate=True),
        "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
        "hard_swish": jax.nn.hard_swish,
        "identity": jax.nn.identity,
        "leaky_relu": jax.nn.leaky_relu,
        "mish": jax.nn.mish,
        "relu": jax.nn.relu,
        "relu6": jax.nn.relu6,
        "selu": jax.nn.selu,
        "sigmoid": jax.nn.sigmoid,
        "silu": jax.nn.silu,
        "softplus": jax.nn.softplus,
        "squared_relu": _squared_relu,
        "swish": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)
"""Activation functions by name; "gelu" is the tanh approximation, Flax's default."""

Activation = str | Callable[[Array], Array]
"""A key of `ACTIVATIONS`, or an elementwise function."""


def activation_of(activation: Activation) -> Callable[[Array], Array]:
    """Returns the function of an activation, given by name or as a function.

    Raises:
      ValueError: If it is an unknown name, or neither a name nor a function.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(ACTIVATIONS)} or a function, got {activation!r}."
        )
    return ACTIVATIONS[activation]


class FeedForward(nnx.Module, SublayerPart):
    """``activation(x W_1 + b_1) W_2 + b_2``, with dropout after the activation and the output.

    With `glu` the first dense layer has two halves, ``(activation(x W_1 + b_1) * (x V + c)) W_2``.

    Attributes:
      activation: The elementwise function, or its name in `ACTIVATIONS`.
      glu: Whether activations are multiplied by a second half.
      chunks: Number of chunks of the length.
      up: First dense layer, M to the hidden width; with `glu` to twice that, ``[W_1, V]``.
      down: Second dense layer, back to M.
      dropout: Applied to the activations and to the output.

    References:
      Shazeer. GLU variants improve Transformer. arXiv:2002.05202.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: Activation = "gelu",
        glu: bool = False,
        chunks: int = 1,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws Xavier-uniform kernels; biases are initialized as zero.

        Args:
          features: M, of inputs and outputs.
          hidden_features: Width between the two layers.
          activation: A key of `ACTIVATIONS`, or an elementwise function; "gelu_exact" is that of
            the original models.
          glu: Multiply activations by a second half of the first layer.
          chunks: Split the length into this number of chunks (at most the number of positions), and
            process one after another, also in the backward pass. Values are the same; the hidden
            activations of only one chunk are in memory, and are recomputed for gradients.
          dropout_rate: Probability to drop an activation or an output.
          dtype: Dtype of the computation; None is that of inputs and parameters.
          rngs: Source of the parameters.

        Raises:
          ValueError: For an unknown activation, or fewer than one chunk.
        """
        activation_of(activation)
        if chunks < 1:
            raise ValueError(f"chunks must be >= 1, got {chunks}.")
        self.activation = activation
        self.glu = glu
        self.chunks = chunks
        width = 2 * hidden_features if glu else hidden_features
        self.up = xavier_linear(features, width, dtype=dtype, rngs=rngs)
        self.down = xavier_linear(hidden_features, features, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)

    @modules_run_on_auto_axes
    def __call__(
        self,
        x: Float[Array, "*B M"],
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*B M"]:
        """Applies the layer to each position independently.

        Args:
          x: ``[*B, M]``.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[*B, M]``.
        """
        if self.chunks == 1 or x.ndim < 2 or x.shape[-2] < 2:
            return self._apply(x, deterministic, rngs)
        return self._apply_in_pieces(x, deterministic, rngs)

    def _apply(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        hidden = self.up(x)
        activation = activation_of(self.activation)
        if self.glu:
            gate, factor = jnp.split(hidden, 2, axis=-1)
            hidden = activation(gate) * factor
        else:
            hidden = activation(hidden)
        hidden = self.dropout(hidden, deterministic=deterministic, rngs=rngs)
        return self.dropout(self.down(hidden), deterministic=deterministic, rngs=rngs)

    def _apply_in_pieces(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        length, features = x.shape[-2:]
        size = -(-length // self.chunks)
        count = -(-length // size)
        padding = [(0, 0)] * (x.ndim - 2) + [(0, count * size - length), (0, 0)]
        pieces = jnp.pad(x, padding).reshape(*x.shape[:-2], count, size, features)
        keys = None
        if rngs is not None and self.dropout.rate > 0 and not deterministic:
            keys = jax.random.split(rngs.dropout(), count)

        @functools.partial(jax.checkpoint, prevent_cse=False)  # A loop body is never merged.
        def apply(piece_and_key: tuple[Array, Array | None]) -> Array:
            piece, key = piece_and_key
            own = None if key is None else nnx.Rngs(dropout=key)
            return self._apply(piece, deterministic, own)

        out = jnp.moveaxis(jax.lax.map(apply, (jnp.moveaxis(pieces, -3, 0), keys)), 0, -3)
        return out.reshape(*x.shape[:-2], count * size, features)[..., :length, :]
