"""Multi-head attention around any ``attention_fn``, with its own random projection.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, M features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.layers.linear import Linear
from fast_attention.layers.positions import rotate
from fast_attention.softmax_attention import make_softmax_attention


class Projection(nnx.Variable):
    """The random projection ``[.., M, D]`` of one layer's features: drawn, not learned."""


class MultiHeadAttention(nnx.Module):
    """Self-attention by any function with the signature of ``nnx.dot_product_attention``.

    Attributes:
      attention_fn: What attends.
      causal: Position t sees positions 0..t, whatever was bound.
      query, key, value, out: Dense layers.
      projection: The layer's own `Projection`, or None where `attention_fn` draws none. It is
        checkpointed with the model, is no parameter, and changes only by `redraw`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        qkv_features: int | None = None,
        num_kv_heads: int | None = None,
        attention_fn: Callable[..., Array] | None = None,
        causal: bool = False,
        rotary: bool = False,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws Xavier-uniform kernels and, where there is one, the projection.

        Args:
          features: M, of inputs and outputs.
          num_heads: H.
          qkv_features: H D, by default M.
          num_kv_heads: K, by default H; query head h reads key head ``h // (H / K)``.
          attention_fn: By default exact attention.
          causal: Makes any `attention_fn` causal.
          rotary: Rotate queries and keys by their positions.
          use_bias: Of the dense layers.
          dropout_rate: Of attention weights, handed to `attention_fn`.
          dtype: To compute in; None is that of inputs and parameters.
          rngs: Source of the parameters and of the projection.

        Raises:
          ValueError: If a number of heads does not divide what it splits.
        """
        qkv_features = features if qkv_features is None else qkv_features
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or qkv_features % num_heads:
            raise ValueError(
                f"qkv_features={qkv_features} must be a multiple of num_heads={num_heads}."
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}."
            )
        self.attention_fn: Callable[..., Any] = attention_fn or make_softmax_attention()
        self.causal = causal
        self.rotary = rotary
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = qkv_features // num_heads
        self.dropout_rate = dropout_rate

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                kernel_init=nnx.initializers.xavier_uniform(),
                dtype=dtype,
                rngs=rngs,
            )

        self.query = linear(features, qkv_features)
        self.key = linear(features, num_kv_heads * self.head_dim)
        self.value = linear(features, num_kv_heads * self.head_dim)
        self.out = linear(qkv_features, features)
        drawn = self._draw(rngs.params())
        self.projection = nnx.data(None if drawn is None else Projection(drawn))

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
        """Attends among the positions of each row.

        Args:
          x: ``[B, T, M]``.
          positions: ``[B, T]`` for rotary positions, by default 0, 1, ...
          segment_ids: ``[B, T]``; positions see their own run of equal ids.
          key_mask: ``[B, T]``; positions where it is False are not seen.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[B, T, M]``.

        Raises:
          ValueError: If dropout is asked for without `rngs`.
        """
        if positions is None and self.rotary:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        query, key, value = self._project(x, positions)
        options = self._options(query.shape[1], segment_ids, key_mask)
        if self.dropout_rate > 0 and not deterministic:
            if rngs is None:
                raise ValueError(
                    f"dropout_rate={self.dropout_rate} needs rngs=nnx.Rngs(...), or pass "
                    "deterministic=True."
                )
            options |= {
                "dropout_rng": rngs.dropout(),
                "dropout_rate": self.dropout_rate,
                "broadcast_dropout": False,
                "deterministic": False,
            }
        out = self.attention_fn(query, key, value, **options, **self._own_projection())
        return self._merge(out)

    def init_state(self, batch_size: int, max_length: int) -> Any:
        """Makes the state before the first token.

        Args:
          batch_size: B.
          max_length: Tokens to make room for; recurrent states need none.

        Returns:
          The state of the `attention_fn`, with B in front.

        Raises:
          TypeError: If `attention_fn` cannot decode.
          ValueError: If the layer is not causal.
        """
        return self._decoder().init_state(
            (batch_size,), self.num_kv_heads, self.head_dim, self.head_dim, max_length=max_length
        )

    def prefill(
        self,
        state: Any,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Attends causally among T new tokens and all before them.

        Args:
          state: What came before.
          x: ``[B, T, M]``.
          positions: ``[B, T]``, needed for rotary positions.
          key_mask: ``[B, T]``; False is padding, on either side.

        Returns:
          ``[B, T, M]`` and the next state.
        """
        query, key, value = self._project(x, positions)
        out, state = self._decoder().prefill(
            state, query, key, value, key_mask=key_mask, **self._own_projection()
        )
        return self._merge(out), state

    def step(
        self, state: Any, x: Float[Array, "B M"], *, positions: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B M"], Any]:
        """Attends from one new token per row to itself and all before it.

        Args:
          state: What came before.
          x: ``[B, M]``.
          positions: ``[B]``, needed for rotary positions.

        Returns:
          ``[B, M]`` and the next state.
        """
        query, key, value = self._project(x, positions)
        out, state = self._decoder().step(state, query, key, value, **self._own_projection())
        return self._merge(out), state

    def redraw(self, rngs: nnx.Rngs) -> None:
        """Replaces the layer's projection, if it has one; stacked layers get one each."""
        if self.projection is None:
            return
        stack = self.projection.shape[:-2]
        draw = self._draw
        for _ in stack:
            draw = jax.vmap(draw)
        key = rngs.params()
        self.projection[...] = draw(jax.random.split(key, stack) if stack else key)

    def _draw(self, key: Array) -> Array | None:
        draw = getattr(self.attention_fn, "draw_projection", None)
        return None if draw is None else draw(key, self.head_dim)

    def _own_projection(self) -> dict[str, Array]:
        return {} if self.projection is None else {"projection": self.projection[...]}

    def _project(self, x: Array, positions: Array | None) -> tuple[Array, Array, Array]:
        def heads(linear: Linear, number: int) -> Array:
            return linear(x).reshape(*x.shape[:-1], number, self.head_dim)

        query = heads(self.query, self.num_heads)
        key = heads(self.key, self.num_kv_heads)
        value = heads(self.value, self.num_kv_heads)
        if self.rotary:
            if positions is None:
                raise ValueError("Rotary positions need positions=, the place of every token.")
            query, key = rotate(query, positions), rotate(key, positions)
        return query, key, value

    def _merge(self, out: Array) -> Array:
        return self.out(out.reshape(*out.shape[:-2], -1))

    def _options(
        self, length: int, segment_ids: Array | None, key_mask: Array | None
    ) -> dict[str, Any]:
        """What the function must know; what it has no name for becomes a mask."""
        options = {"segment_ids": segment_ids, "key_mask": key_mask, "is_causal": self.causal}
        options = {name: x for name, x in options.items() if x is not None and x is not False}
        names = _keywords(self.attention_fn)
        if names is None:
            return options
        mask: Any = True
        if "key_mask" in options and "key_mask" not in names:
            mask &= options.pop("key_mask")[:, None, None, :]
        if "segment_ids" in options and "segment_ids" not in names:
            ids = options.pop("segment_ids")
            runs = jnp.cumsum(jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
            mask &= runs[:, None, :, None] == runs[:, None, None, :]
        if "is_causal" in options and "is_causal" not in names:
            options.pop("is_causal")
            mask &= jnp.tri(length, dtype=bool)[None, None]
        return options if mask is True else options | {"mask": mask}

    def _decoder(self) -> Any:
        if not self.causal and not getattr(self.attention_fn, "unidirectional", False):
            raise ValueError(
                "Only causal attention decodes token by token: build the layer with causal=True."
            )
        if not hasattr(self.attention_fn, "step"):
            raise TypeError(
                f"{self.attention_fn} cannot decode: it has no init_state, prefill and step. Use "
                "exact attention (attention_fn=None) or one of the make_fast_* factories."
            )
        return self.attention_fn


def redraw(model: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draws new random projections for every attention layer of a model, in place.

    Features with a projection redrawn every few steps do not adapt to its errors (FAVOR+,
    arXiv:2009.14794, section 4.2). Redraw while training, never while evaluating.

    Args:
      model: Any module with `MultiHeadAttention` layers somewhere inside.
      rngs: Source of the new projections.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MultiHeadAttention):
            module.redraw(rngs)


def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the parameters of a function; None if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)
