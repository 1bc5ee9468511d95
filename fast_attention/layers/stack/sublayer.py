"""One residual part of a stack: norm, token shift, inner layer and gain.

Shape letters: B batch, T length, M features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.attention.config import AttentionConfig
from fast_attention.layers.attention.linformer import LinformerAttention, LinformerConfig
from fast_attention.layers.attention.multi_head import NO_INPUTS, MultiHeadAttention
from fast_attention.layers.dropout import check_rate
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.feed_forward import Activation, FeedForward
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.norms import ReZero, make_norm
from fast_attention.layers.product_key_memory import ProductKeyMemory
from fast_attention.layers.sublayer_part import SublayerPart
from fast_attention.layers.token_shift import last_visible, shift_tokens, starts_of_runs


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """Shape of a `FeedForward`; the attributes are its arguments."""

    hidden_features: int
    activation: Activation = "gelu"
    glu: bool = False
    chunks: int = 1
    dropout_rate: float = 0.0

    def __post_init__(self):
        """Checks the rate; the layer checks the rest.

        Raises:
          ValueError: If the rate is out of range.
        """
        check_rate(self.dropout_rate)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Shape of a `ProductKeyMemory`; the attributes are its arguments."""

    num_keys: int = 128
    num_heads: int = 4
    top_k: int = 32
    head_dim: int = 256
    norm: Literal["layer", "batch"] = "layer"


@dataclasses.dataclass(frozen=True)
class SublayerConfig:
    """Configuration of a sublayer.

    Attributes:
      inner: Configuration of the inner layer, of a class in `BUILDERS`.
      shifts: Token shifts before the inner layer, see `shift_tokens`; None for no shift.
    """

    inner: Any
    shifts: tuple[int, ...] | None = None

    def __post_init__(self):
        """Checks the class of `inner`, and the shifts.

        Raises:
          TypeError: If there is no layer for such a configuration.
          ValueError: If the shifts look ahead in a causal layer.
        """
        if type(self.inner) not in BUILDERS:
            raise TypeError(
                f"inner must be one of {', '.join(sorted(kind.__name__ for kind in BUILDERS))}, "
                f"got {self.inner!r}."
            )
        causal = isinstance(self.inner, AttentionConfig) and self.inner.causal
        if causal and self.shifts is not None and min(self.shifts) < 0:
            raise ValueError(f"A causal layer cannot look ahead, got shifts={self.shifts}.")


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """How the stream is normalised at each sublayer.

    Attributes:
      kind: "layer", "scale", "rms" or "none"; or "rezero": no norm, but a learned gain on the
        increment (arXiv:2003.04887).
      epsilon: Added to variances and mean squares; the minimum norm that "scale" divides by.
      gain: Initial gain of "rezero".
      after: Normalise the sum of the stream and the increment (post-norm, as in BERT) instead of
        the input of the sublayer.
    """

    kind: str = "layer"
    epsilon: float = 1e-6
    gain: float = 0.0
    after: bool = False

    def __post_init__(self):
        """Checks the combination.

        Raises:
          ValueError: If there is no norm for `after`.
        """
        if self.after and self.kind in ("rezero", "none"):
            raise ValueError(f"after=True needs a norm, got kind={self.kind!r}.")


class SublayerState(NamedTuple):
    """The decoding state of a sublayer.

    Attributes:
      inner: The state of attention, None for position-wise layers.
      before: ``[B, M]``, the last output of the norm; None without token shift.
    """

    inner: Any
    before: Array | None


class Sublayer(nnx.Module):
    """Computes ``gain * inner(shift(norm(x)))``, which the stack adds to the stream.

    With `NormConfig.after` it is ``inner(shift(x))``, and the norm follows the sum (`leave`).

    Attributes:
      config: Its configuration.
      norm: The norm, or identity.
      inner: Attention, feed-forward or memory.
      gain: A `ReZero`, or None.
    """

    def __init__(
        self,
        features: int,
        config: SublayerConfig,
        norm: NormConfig,
        *,
        inner: SublayerPart | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          features: M.
          config: Configuration of the sublayer.
          norm: Configuration of the norm.
          inner: A module to share with another sublayer; None builds one.
          dtype: Dtype of the computation; None is that of inputs and parameters.
          rngs: Source of the parameters.
        """
        self.config = config
        self.features = features
        self.dtype = dtype
        kind = "none" if norm.kind == "rezero" else norm.kind
        self.norm = make_norm(kind, features, epsilon=norm.epsilon, dtype=dtype, rngs=rngs)
        self.norm_after = norm.after
        self.gain = ReZero(norm.gain) if norm.kind == "rezero" else None
        self.inner = (
            build_inner(features, config, dtype=dtype, rngs=rngs) if inner is None else inner
        )

    @modules_run_on_auto_axes
    def __call__(
        self,
        x: Float[Array, "B T M"],
        inputs: Inputs = NO_INPUTS,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        choices: Any = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Computes the increment of the stream.

        Args:
          x: The stream.
          inputs: Other inputs of attention.
          deterministic: No dropout.
          rngs: Source of dropout.
          choices: Choices returned by an earlier call, to be used again.

        Returns:
          ``[B, T, M]``, and the choices of attention or memory, or None.
        """
        x = self._enter(x)
        if self.config.shifts is not None:
            starts = starts_of_runs(inputs.segment_ids, inputs.key_mask)
            x = shift_tokens(x, self.config.shifts, starts=starts, key_mask=inputs.key_mask)
        added, choices = self.inner.add(
            x, self._known(inputs), choices=choices, deterministic=deterministic, rngs=rngs
        )
        return self._scaled(added), choices

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one."""
        if self.config.shifts is not None and min(self.config.shifts) < 0:
            return False
        return self.inner.causal

    @property
    def can_decode(self) -> bool:
        """Whether the sublayer can decode from a state; False if it looks ahead."""
        if self.config.shifts is not None and not set(self.config.shifts) <= {0, 1}:
            return False
        return self.inner.can_decode

    @modules_run_on_auto_axes
    def init_state(
        self, batch_size: int, max_length: int, inputs: Inputs = NO_INPUTS
    ) -> SublayerState:
        """Makes the state before the first token, see `MultiHeadAttention.init_state`."""
        before, shifts = None, self.config.shifts
        looks_ahead = shifts is not None and not set(shifts) <= {0, 1}
        if looks_ahead:
            raise TypeError(f"{self.config} looks ahead and cannot decode token by token.")
        inner = self.inner.init_state(batch_size, max_length, self._known(inputs))
        if self.config.shifts is not None:
            before = jnp.zeros((batch_size, self.features), self.dtype or jnp.float32)
        return SublayerState(inner, before)

    @modules_run_on_auto_axes
    def prefill(
        self, state: SublayerState, x: Float[Array, "B T M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B T M"], SublayerState]:
        """Computes the increment of T new tokens per row, see `MultiHeadAttention.prefill`."""
        x, inner, before = self._enter(x), state.inner, state.before
        if before is not None and self.config.shifts is not None:
            first, starts = before.astype(x.dtype), starts_of_runs(None, inputs.key_mask)
            last = last_visible(x, inputs.key_mask, first)
            x = shift_tokens(
                x, self.config.shifts, starts=starts, before=first, key_mask=inputs.key_mask
            )
            before = last.astype(before.dtype)
        x, inner = self.inner.prefill(inner, x, inputs)
        return self._scaled(x), SublayerState(inner, before)

    @modules_run_on_auto_axes
    def step(
        self, state: SublayerState, x: Float[Array, "B M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B M"], SublayerState]:
        """Computes the increment of one new token per row, see `MultiHeadAttention.step`."""
        x, inner, before = self._enter(x), state.inner, state.before
        if before is not None and self.config.shifts is not None:
            last, first = x, before.astype(x.dtype)
            x = shift_tokens(x[:, None], self.config.shifts, before=first)[:, 0]
            before = last.astype(before.dtype)
        x, inner = self.inner.step(inner, x, inputs)
        return self._scaled(x), SublayerState(inner, before)

    def leave(self, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """The stream after the sum, normalised with `NormConfig.after`."""
        return self.norm(x) if self.norm_after else x

    def _enter(self, x: Array) -> Array:
        return x if self.norm_after else self.norm(x)

    def _known(self, inputs: Inputs) -> Inputs:
        """Inputs without the context, for layers without one."""
        if self.inner.reads_context:
            return inputs
        return inputs._replace(context=None, context_mask=None)

    def _scaled(self, x: Array) -> Array:
        return x if self.gain is None else self.gain(x)


def _from_fields(layer: Callable[..., SublayerPart]) -> Callable[..., SublayerPart]:
    """A builder of a layer whose arguments are the fields of its configuration."""

    def build(features: int, config: Any, *, dtype: Any, rngs: nnx.Rngs) -> SublayerPart:
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return layer(features, **fields, dtype=dtype, rngs=rngs)

    return build


BUILDERS: dict[type, Callable[..., SublayerPart]] = {
    AttentionConfig: MultiHeadAttention,
    FeedForwardConfig: _from_fields(FeedForward),
    LinformerConfig: LinformerAttention,
    MemoryConfig: _from_fields(ProductKeyMemory),
}
"""Builds a layer from its configuration: ``BUILDERS[type(config)](features, config, ...)``."""


def build_inner(
    features: int, config: SublayerConfig, *, dtype: Any = None, rngs: nnx.Rngs
) -> SublayerPart:
    """Builds the inner layer of a sublayer, with its own parameters."""
    return BUILDERS[type(config.inner)](features, config.inner, dtype=dtype, rngs=rngs)
