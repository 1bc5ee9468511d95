"""Checked inputs of all implementations of linear attention, in one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear.devices import check_device_kind
from fast_attention.linear.state import LinearAttentionState
from fast_attention.mesh.layout import AxisName

Output = Literal["mean", "sum", "parts"]

SavedStates = Literal["all", "few"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static options of a call. Hashable; arrays are passed separately.

    Attributes:
      feature_map: phi, applied to queries and keys, see :mod:`fast_attention.feature_maps`.
      causal: position t sees keys 0..t.
      output: "mean" divides by the sum of weights; "sum" returns the numerator at its true scale;
        "parts" returns numerator, denominator and their common log-scale (:class:`Parts`), for
        merging.
      epsilon: denominators up to this size are inverted as ``den / epsilon^2``. Not needed for
        positive maps; for signed maps it bounds outputs if a denominator vanishes.
      chunk_size: positions per chunk (1: token by token); None takes it from the row of the device
        in :mod:`fast_attention.linear.chunked.chunk_table`.
      unroll: chunks unrolled in the compiled loop; None takes it from the same row.
      device_kind: the kind of device for this row, such as "TPU v5e" or "NVIDIA H100", or a
        platform such as "tpu"; None means the devices of this process, or the target platform of a
        program that is compiled for others.
      saved_states: states saved for the backward pass of causal attention: "all" states between
        chunks (``T K V M / C`` numbers), or a "few" (about the square root of the number of
        chunks), from which the others are recomputed, group by group. None is "all" for short
        sequences and "few" for long ones.
      implementation: a name of :data:`fast_attention.linear.IMPLEMENTATIONS`, or several to try in
        order. None is "by_platform", the best one for the platform of the compiled program.
      precision: of products of features and values. By default, products of bfloat16 inputs are
        computed in bfloat16 and accumulated in float32; "highest" computes them in float32.
        Exponents are always float32.
      axis_name: the mesh axis, or a tuple of axes, along which the sequence is sharded, for calls
        inside ``jax.shard_map``; None if the sequence is on one device.
      complete: also compute factors that cancel under normalisation, because the state or the parts
        are used elsewhere. :func:`~fast_attention.linear.linear_attention` sets it for states.
    """

    feature_map: FeatureMap
    causal: bool = False
    output: Output = "mean"
    epsilon: float = 0.0
    chunk_size: int | None = None
    unroll: int | None = None
    device_kind: str | None = None
    saved_states: SavedStates | None = None
    implementation: str | Sequence[str] | None = None
    precision: jax.lax.PrecisionLike = None
    axis_name: AxisName | None = None
    complete: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown option value."""
        if self.output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}, got {self.output!r}.")
        for name, number in (("chunk_size", self.chunk_size), ("unroll", self.unroll)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        check_device_kind(self.device_kind)
        check_saved_states(self.saved_states)
        if isinstance(self.implementation, list):
            object.__setattr__(self, "implementation", tuple(self.implementation))

    @property
    def exact_scale(self) -> bool:
        """Whether factors that cancel under normalisation must be computed."""
        return self.output == "sum" or self.complete

    @property
    def carries_state(self) -> bool:
        """Whether earlier keys come as a state, or the final state is used.

        A part of a sequence along a mesh axis does both, in units in which factors may be missing.
        """
        return self.complete or self.axis_name is not None


def check_saved_states(saved_states: object) -> None:
    """Raises ValueError unless ``saved_states`` is "all", "few" or None."""
    if saved_states not in (*get_args(SavedStates), None):
        raise ValueError(f"saved_states must be 'all', 'few' or None, got {saved_states!r}.")


class Inputs(NamedTuple):
    """The arrays of one call. B batch, T queries, S keys, H heads, K key/value heads.

    Attributes:
      query: ``[B, T, H, D]``.
      key: ``[B, S, K, D]``.
      value: ``[B, S, K, V]``.
      parameters: of the feature map; leading axes, if any, broadcast against ``[B, K]``.
      key_mask: bool ``[B, S, K or 1]`` or None; False contributes nothing.
      key_bias: ``[B, S, K or 1]`` or None; a factor ``exp(bias)`` on each key.
      segment_ids: int ``[B, T]`` or None; contiguous runs that do not attend to each other.
      state: state of earlier keys, with no batch axes besides B.
      log_decay: ``[B, S, K]`` or None; the state before a token is multiplied by its exponential.
    """

    query: Array
    key: Array
    value: Array
    parameters: Parameters
    key_mask: Array | None
    key_bias: Array | None
    segment_ids: Array | None
    state: LinearAttentionState
    log_decay: Array | None = None


class Parts(NamedTuple):
    """Attention before the division: ``numerator exp(log_scale) / (denominator exp(log_scale))``.

    Attributes:
      numerator: ``[B, T, H, V]``.
      denominator: ``[B, T, H]``.
      log_scale: ``[B, T, H]``, constant for differentiation, or None for maps without exponents.
    """

    numerator: Array
    denominator: Array
    log_scale: Array | None


def merge_parts(left: Parts, right: Parts) -> Parts:
    """Adds two attentions of the same queries over disjoint keys."""
    if left.log_scale is None or right.log_scale is None:
        return Parts(left.numerator + right.numerator, left.denominator + right.denominator, None)
    scale = jax.lax.stop_gradient(jnp.maximum(left.log_scale, right.log_scale))
    left_factor = jnp.exp(jax.lax.stop_gradient(left.log_scale) - scale)
    right_factor = jnp.exp(jax.lax.stop_gradient(right.log_scale) - scale)
    return Parts(
        left.numerator * left_factor[..., None] + right.numerator * right_factor[..., None],
        left.denominator * left_factor + right.denominator * right_factor,
        scale,
    )


def finish(parts: Parts, output: Output, epsilon: float) -> Array:
    """Divides (or scales back) attention parts, ``[B, T, H, V]``."""
    if output == "mean":
        return parts.numerator * safe_inverse(parts.denominator, epsilon)[..., None]
    if parts.log_scale is None:
        return parts.numerator
    return parts.numerator * jnp.exp(parts.log_scale)[..., None]


def safe_inverse(denominator: Array, epsilon: float) -> Array:
    """``1 / den``, or ``den / epsilon^2`` if ``|den| <= epsilon``; 0 if no key is seen.

    Continuous, bounded by ``1 / epsilon``, and with the sign of ``den``.
    """
    seen = denominator != 0
    inverse = jnp.where(seen, 1 / jnp.where(seen, denominator, 1), 0)
    if not epsilon:
        return inverse
    return jnp.where(jnp.abs(denominator) > epsilon, inverse, denominator / epsilon**2)


def inverse_slope(denominator: Array, epsilon: float) -> Array:
    """``d log safe_inverse / d denominator``, 0 if no key is seen.

    Derivatives of ``y = num * safe_inverse(den)`` with respect to den are ``y`` times this.
    """
    seen = denominator != 0
    slope = jnp.where(seen, -1 / jnp.where(seen, denominator, 1), 0)
    return jnp.where(jnp.abs(denominator) > epsilon, slope, -slope) if epsilon else slope
