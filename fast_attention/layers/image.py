"""Linear attention among the pixels of feature maps.

Shape letters: B batch, X and Y sides of a map, C channels, P pixels, H heads, D key width, V value
width, O output channels.

Reference: Shen et al., "Efficient Attention: Attention with Linear Complexities",
arXiv:1812.01243.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.mechanisms.efficient.op import efficient_attention


class ImageLinearAttention(nnx.Module):
    """Efficient attention between convolutions, linear in the number of pixels.

    Queries and keys are multiplied by ``D^(-1/4)``, but keys of a context are not, as in the
    original. Keys are normalised over the pixels of image and context, queries over their channels.

    Attributes:
      query, key, value, out: Convolutions.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        kernel_size: int = 1,
        padding: int = 0,
        stride: int = 1,
        key_dim: int = 64,
        value_dim: int = 64,
        num_heads: int = 8,
        norm_queries: bool = True,
        channel_first: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the convolutions.

        Args:
          channels: C.
          out_channels: O, by default C.
          kernel_size: Side length of all four kernels.
          padding: Zero padding of their inputs.
          stride: Stride of the first three convolutions; the output is smaller by this factor.
          key_dim: D, per head.
          value_dim: V, per head.
          num_heads: H.
          norm_queries: Apply softmax to queries over their channels; if False use them unchanged.
          channel_first: Maps are ``[B, C, X, Y]``, inputs and outputs.
          dtype: Dtype of the computation; None is that of inputs and parameters.
          rngs: Source of the parameters.
        """
        self.kernel_size = kernel_size
        self.padding = padding
        self.stride = stride
        self.key_dim = key_dim
        self.num_heads = num_heads
        self.norm_queries = norm_queries
        self.channel_first = channel_first

        def convolution(inputs: int, outputs: int, stride: int) -> nnx.Conv:
            return nnx.Conv(
                inputs,
                outputs,
                (kernel_size, kernel_size),
                strides=stride,
                padding=padding,
                dtype=dtype,
                rngs=rngs,
            )

        self.query = convolution(channels, num_heads * key_dim, stride)
        self.key = convolution(channels, num_heads * key_dim, stride)
        self.value = convolution(channels, num_heads * value_dim, stride)
        out_channels = channels if out_channels is None else out_channels
        self.out = convolution(num_heads * value_dim, out_channels, 1)

    @modules_run_on_auto_axes
    def __call__(
        self, x: Float[Array, "B X Y C"], *, context: Float[Array, "B *P C"] | None = None
    ) -> Float[Array, "B X2 Y2 O"]:
        """Attends from every pixel to all pixels, and to those of a context.

        Args:
          x: ``[B, X, Y, C]``.
          context: ``[B, *pixels, C]``; its pixels, flattened to one row, are additional keys and
            values. For larger kernels the row is a map of height 1, as in the original.

        Returns:
          ``[B, X', Y', O]``; X' and Y' are the sizes after the convolutions.

        Raises:
          ValueError: If a map or a context is smaller than the kernel.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be a map with four axes, got shape {x.shape}.")
        if self.channel_first:
            x = jnp.moveaxis(x, 1, -1)
        scale = self.key_dim**-0.25
        self._check_fits("x", x.shape[1:3])
        query = self.query(x) * scale
        key, value = self.key(x) * scale, self.value(x)
        pixels = [(key, value)]
        if context is not None:
            if self.channel_first:
                context = jnp.moveaxis(context, 1, -1)
            row = self._row(context)
            pixels.append((self.key(row), self.value(row)))

        def heads(x: Array) -> Array:
            return x.reshape(x.shape[0], -1, self.num_heads, x.shape[-1] // self.num_heads)

        key = jnp.concatenate([heads(key) for key, _ in pixels], axis=1)
        value = jnp.concatenate([heads(value) for _, value in pixels], axis=1)
        out = efficient_attention(heads(query), key, value, normalize_queries=self.norm_queries)
        out = out.reshape(*query.shape[:-1], -1)
        self._check_fits("attention of x", out.shape[1:3])
        out = self.out(out)
        return jnp.moveaxis(out, -1, 1) if self.channel_first else out

    def _row(self, context: Array) -> Array:
        """Flattens pixels to ``[B, 1, P, C]``, padded above and below for the kernel."""
        number = math.prod(context.shape[1:-1])
        row = context.reshape(context.shape[0], 1, number, context.shape[-1])
        self._check_fits("the row of context pixels", (self.kernel_size, number))
        missing = max(0, self.kernel_size - 1 - 2 * self.padding)
        return jnp.pad(row, ((0, 0), (missing // 2, missing - missing // 2), (0, 0), (0, 0)))

    def _check_fits(self, name: str, sides: tuple[int, ...]) -> None:
        if min(sides) + 2 * self.padding < self.kernel_size:
            raise ValueError(
                f"A kernel of {self.kernel_size} with padding={self.padding} does not fit into "
                f"{name} with sides {sides}: use more padding, or larger maps."
            )
