"""One residual part of a stack: norm, token shift, what it adds, and its gain.

Shape letters: B batch, T length, M features.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.attention.config import AttentionConfig
from fast_attention.layers.attention.linformer import LinformerAttention
from fast_attention.layers.attention.multi_head import NO_INPUTS, MultiHeadAttention
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.feed_forward import Activation, FeedForward
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.norms import ReZero, make_norm
from fast_attention.layers.product_key_memory import ProductKeyMemory
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
          ValueError: At a rate out of range.
        """
        _check_rate(self.dropout_rate)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Shape of a `ProductKeyMemory`; the attributes are its arguments."""

    num_keys: int = 128
    num_heads: int = 4
    top_k: int = 32
    head_dim: int = 256
    norm: Literal["layer", "batch"] = "layer"


@dataclasses.dataclass(frozen=True)
class LinformerConfig:
    """Shape of a `LinformerAttention`; the attributes are its arguments.

    With `cross` its keys and values are those of the context.
    """

    num_heads: int
    length: int
    projected: int
    head_dim: int | None = None
    cross: bool = False
    dropout_rate: float = 0.0

    def __post_init__(self):
        """Checks the rate; the layer checks the rest.

        Raises:
          ValueError: At a rate out of range.
        """
        _check_rate(self.dropout_rate)


@dataclasses.dataclass(frozen=True)
class SublayerConfig:
    """What a sublayer adds to the residual stream.

    Attributes:
      inner: The configuration of what is added.
      shifts: Positions by which groups of channels are moved before, see `shift_tokens`; None
        moves nothing.
    """

    inner: AttentionConfig | FeedForwardConfig | MemoryConfig | LinformerConfig
    shifts: tuple[int, ...] | None = None

    def __post_init__(self):
        """Checks the shifts.

        Raises:
          ValueError: If they look ahead in a causal layer.
        """
        causal = isinstance(self.inner, AttentionConfig) and self.inner.causal
        if causal and self.shifts is not None and min(self.shifts) < 0:
            raise ValueError(f"A causal layer cannot look ahead, got shifts={self.shifts}.")


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """How the stream is normalised before each sublayer.

    Attributes:
      kind: "layer", "scale", "rms" or "none"; or "rezero": no norm, but a learned gain on what is
        added (arXiv:2003.04887).
      epsilon: Added to variances and mean squares; the smallest length that "scale" divides by.
      gain: The gain of "rezero" at first.
    """

    kind: str = "layer"
    epsilon: float = 1e-6
    gain: float = 0.0


class SublayerState(NamedTuple):
    """What a sublayer remembers of the tokens so far.

    Attributes:
      inner: The state of attention, None for parts that see one position alone.
      before: ``[B, M]``, what came last out of the norm; None without token shift.
    """

    inner: Any
    before: Array | None


class Sublayer(nnx.Module):
    """Computes ``gain * inner(shift(norm(x)))``, which the stack adds to the stream.

    Attributes:
      config: What it adds.
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
        inner: nnx.Module | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          features: M.
          config: What is added.
          norm: How the stream is normalised.
          inner: A module to share with another sublayer; None builds one.
          dtype: To compute in; None is that of inputs and parameters.
          rngs: Source of the parameters.
        """
        self.config = config
        self.features = features
        self.dtype = dtype
        kind = "none" if norm.kind == "rezero" else norm.kind
        self.norm = make_norm(kind, features, epsilon=norm.epsilon, dtype=dtype, rngs=rngs)
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
        """Computes what is to be added.

        Args:
          x: The stream.
          inputs: What attention reads besides.
          deterministic: No dropout.
          rngs: Source of dropout.
          choices: What an earlier call returned, to be chosen again.

        Returns:
          ``[B, T, M]``, and what attention or memory chose, else None.
        """
        x = self.norm(x)
        if self.config.shifts is not None:
            starts = starts_of_runs(inputs.segment_ids, inputs.key_mask)
            x = shift_tokens(x, self.config.shifts, starts=starts, key_mask=inputs.key_mask)
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        if isinstance(self.inner, MultiHeadAttention):
            out, choices = self.inner.attend(
                x, _known(self.config, inputs), choices=choices, **options
            )
            return self._scaled(out), choices
        if isinstance(self.inner, ProductKeyMemory):
            out, choices = self.inner(
                x, key_mask=inputs.key_mask, chosen=choices, return_chosen=True, **options
            )
            return self._scaled(out), choices
        if isinstance(self.inner, LinformerAttention):
            if inputs.mask is not None and not self._cross():
                raise ValueError("Linformer mixes all positions: it takes no mask, got one.")
            if self._cross():
                known: Any = {"context": inputs.context, "key_mask": inputs.context_mask}
            else:
                known = {"key_mask": inputs.key_mask, "segment_ids": inputs.segment_ids}
            return self._scaled(self.inner(x, **known, **options)), None
        return self._scaled(self.inner(x, **options)), None

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one."""
        if self.config.shifts is not None and min(self.config.shifts) < 0:
            return False
        if isinstance(self.inner, LinformerAttention):
            return self._cross()
        return not isinstance(self.inner, MultiHeadAttention) or self.inner.causal

    @property
    def can_decode(self) -> bool:
        """Whether the sublayer reads on from a state; False where it looks ahead."""
        if self.config.shifts is not None and not set(self.config.shifts) <= {0, 1}:
            return False
        if isinstance(self.inner, LinformerAttention):
            return False
        return not isinstance(self.inner, MultiHeadAttention) or self.inner.can_decode

    @modules_run_on_auto_axes
    def init_state(
        self, batch_size: int, max_length: int, inputs: Inputs = NO_INPUTS
    ) -> SublayerState:
        """Makes the state before the first token, see `MultiHeadAttention.init_state`."""
        before, inner = None, None
        if isinstance(self.inner, MultiHeadAttention):
            inner = self.inner.init_state(batch_size, max_length, _known(self.config, inputs))
        if not self.can_decode:
            raise TypeError(f"{self.config} looks ahead and cannot decode token by token.")
        if self.config.shifts is not None:
            before = jnp.zeros((batch_size, self.features), self.dtype or jnp.float32)
        return SublayerState(inner, before)

    @modules_run_on_auto_axes
    def prefill(
        self, state: SublayerState, x: Float[Array, "B T M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B T M"], SublayerState]:
        """Computes what is added to T new tokens per row, see `MultiHeadAttention.prefill`."""
        x, inner, before = self.norm(x), state.inner, state.before
        if before is not None and self.config.shifts is not None:
            first, starts = before.astype(x.dtype), starts_of_runs(None, inputs.key_mask)
            last = last_visible(x, inputs.key_mask, first)
            x = shift_tokens(
                x, self.config.shifts, starts=starts, before=first, key_mask=inputs.key_mask
            )
            before = last.astype(before.dtype)
        if isinstance(self.inner, MultiHeadAttention):
            x, inner = self.inner.prefill(inner, x, inputs)
        else:
            x = self.inner(x)
        return self._scaled(x), SublayerState(inner, before)

    @modules_run_on_auto_axes
    def step(
        self, state: SublayerState, x: Float[Array, "B M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B M"], SublayerState]:
        """Computes what is added to one new token per row, see `MultiHeadAttention.step`."""
        x, inner, before = self.norm(x), state.inner, state.before
        if before is not None and self.config.shifts is not None:
            last, first = x, before.astype(x.dtype)
            x = shift_tokens(x[:, None], self.config.shifts, before=first)[:, 0]
            before = last.astype(before.dtype)
        if isinstance(self.inner, MultiHeadAttention):
            x, inner = self.inner.step(inner, x, inputs)
        else:
            x = self.inner(x[:, None])[:, 0]
        return self._scaled(x), SublayerState(inner, before)

    def _cross(self) -> bool:
        return isinstance(self.config.inner, LinformerConfig) and self.config.inner.cross

    def _scaled(self, x: Array) -> Array:
        return x if self.gain is None else self.gain(x)


def build_inner(
    features: int, config: SublayerConfig, *, dtype: Any = None, rngs: nnx.Rngs
) -> nnx.Module:
    """Builds what a sublayer adds, with parameters of its own."""
    inner = config.inner
    if isinstance(inner, AttentionConfig):
        return MultiHeadAttention(features, inner, dtype=dtype, rngs=rngs)
    options = {field.name: getattr(inner, field.name) for field in dataclasses.fields(inner)}
    if isinstance(inner, LinformerConfig):
        options.pop("cross")
        return LinformerAttention(features, **options, dtype=dtype, rngs=rngs)
    kind = FeedForward if isinstance(inner, FeedForwardConfig) else ProductKeyMemory
    return kind(features, **options, dtype=dtype, rngs=rngs)


def _known(config: SublayerConfig, inputs: Inputs) -> Inputs:
    """Inputs without the context, for layers that have none."""
    inner = config.inner
    if isinstance(inner, AttentionConfig) and inner.context is None:
        return inputs._replace(context=None, context_mask=None)
    return inputs


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}.")
