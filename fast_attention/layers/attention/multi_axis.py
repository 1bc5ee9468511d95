"""Multi-head attention over chosen axes of inputs of any rank.

Shape letters: B batch, A the axes attended over (flattened to T queries and S keys), C features,
H heads, D head width, V value width, O output features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.layers.attention.stored_projections import as_held, held_projection, redraw
from fast_attention.layers.dropout import dropout_options
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.linear import Linear, xavier_linear
from fast_attention.mechanisms.axes import attended_axes, fold_axes, unfold_axes
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.softmax_attention import make_softmax_attention


class MultiAxisAttention(nnx.Module):
    """Attention over some axes of ``[B, *axes, C]``; the other axes are batch axes.

    Attributes:
      attention_fn: The attention function.
      attention_axes: The axes attended over, or None for all between the first and the last.
      query, key, value, out: Dense layers.
      projection: The layer's own random `Projection` (several by name, for stored parameters of
        random features), None if `attention_fn` draws none.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        *,
        features: int | Sequence[int],
        value_dim: int | None = None,
        output_features: int | Sequence[int] | None = None,
        attention_axes: int | Sequence[int] | None = None,
        attention_fn: Callable[..., Array] | None = None,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws Xavier-uniform kernels and the projection, if there is one.

        Args:
          num_heads: H.
          key_dim: D, per head.
          features: C, or one for each of query, key and value.
          value_dim: V, by default D.
          output_features: O, by default `features`; several numbers give several last axes.
          attention_axes: Axes of the input to attend over, counted from 0; by default all except
            the first and the last.
          attention_fn: By default exact attention. FAVOR+, `make_fast_softmax_attention`, takes
            time linear in the product of the axes' lengths.
          use_bias: Whether the dense layers have biases.
          dropout_rate: Dropout rate of attention weights, passed to `attention_fn`.
          dtype: Dtype of the computation; None is that of inputs and parameters.
          rngs: Source of the parameters and of the projection.
        """
        widths = (features,) * 3 if isinstance(features, int) else tuple(features)
        if len(widths) != 3:
            raise ValueError(
                "features must be one number, or one for each of query, key and value, got "
                f"{features}."
            )
        value_dim = key_dim if value_dim is None else value_dim
        output = widths[0] if output_features is None else output_features
        self.attention_fn = as_attention_fn(attention_fn or make_softmax_attention())
        if self.attention_fn.moment_decay is not None:
            raise ValueError(
                "MultiAxisAttention keeps no running moments: leave out moment_decay, and use "
                "calibrate(model, inputs)."
            )
        self.attention_axes = (
            tuple(attention_axes) if isinstance(attention_axes, Sequence) else attention_axes
        )
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.output_shape = tuple(output) if isinstance(output, Sequence) else (output,)

        linear = functools.partial(xavier_linear, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.query = linear(widths[0], num_heads * key_dim)
        self.key = linear(widths[1], num_heads * key_dim)
        self.value = linear(widths[2], num_heads * value_dim)
        self.out = linear(num_heads * value_dim, math.prod(self.output_shape))
        self.key_dim = key_dim
        drawn = self.attention_fn.draw_projection(rngs.params(), key_dim)
        self.projection = nnx.data(as_held(drawn, num_heads))

    @modules_run_on_auto_axes
    def __call__(
        self,
        query: Float[Array, "*B C"],
        key: Float[Array, "*A C"] | None = None,
        value: Float[Array, "*A C"] | None = None,
        *,
        key_mask: Bool[Array, "*A"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, ...]:
        """Attends from query to key over the attention axes, flattened in row-major order.

        Args:
          query: ``[B, *axes, C]``, with three axes or more.
          key: By default the query. Only its attended axes may have other lengths than those of the
            query.
          value: By default the key; may differ from it only in C.
          key_mask: The shape of key without its last axis; a key where it is False is not seen.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          The shape of query with the last axis replaced by the output features.

        Raises:
          ValueError: For axes that do not fit, or dropout without `rngs`.
        """
        key = query if key is None else key
        value = key if value is None else value
        axes = self._axes(query, key, value)
        if key_mask is not None and key_mask.shape != key.shape[:-1]:
            raise ValueError(
                f"key_mask must have the shape of key without its last axis, {key.shape[:-1]}, "
                f"got {key_mask.shape}."
            )
        options = dropout_options(self.dropout_rate, deterministic, rngs)
        if key_mask is not None:
            options["key_mask"] = fold_axes(key_mask, axes, trailing=0)
        if self.projection is not None:
            options["projection"] = held_projection(self.projection)

        def heads(linear: Linear, x: Array) -> Array:
            projected = linear(x)
            return projected.reshape(
                *x.shape[:-1], self.num_heads, projected.shape[-1] // self.num_heads
            )

        out = self.attention_fn(
            fold_axes(heads(self.query, query), axes, trailing=2),
            fold_axes(heads(self.key, key), axes, trailing=2),
            fold_axes(heads(self.value, value), axes, trailing=2),
            **options,
        )
        out = unfold_axes(out, axes, (*query.shape[:-1], *out.shape[-2:]))
        out = self.out(jax.lax.collapse(out, -2))
        return out.reshape(*query.shape[:-1], *self.output_shape)

    def redraw(self, rngs: nnx.Rngs) -> None:
        """Replaces the layer's projection, if it has one."""
        if self.projection is not None:
            redraw(self.attention_fn, self.projection, None, rngs.params(), self.key_dim)

    def _axes(self, query: Array, key: Array, value: Array) -> tuple[int, ...] | None:
        """The checked axes to attend over; None if no transposition is needed."""
        shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
        if query.ndim < 3 or query.ndim != key.ndim:
            raise ValueError(
                f"query and key must have the same number of axes, [B, *axes, C], got {shapes}."
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key and value must agree in all axes but the last, got {shapes}.")
        given = self.attention_axes
        if given is None:
            given = tuple(range(1, query.ndim - 1))
        numbers = (given,) if isinstance(given, int) else given
        # Counted from the end, an axis of the input is one further in front of heads and width.
        along = tuple(a + query.ndim if a < 0 else a for a in numbers)
        axes = attended_axes(query.ndim + 1, along)
        attended = (query.ndim - 2,) if axes is None else axes
        for a in range(query.ndim - 1):
            if a not in attended and query.shape[a] != key.shape[a]:
                raise ValueError(
                    f"query and key must have equal lengths along axis {a}, which is not attended "
                    f"over (attention_axes={given}), got {shapes}."
                )
        return axes
