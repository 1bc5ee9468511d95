"""Attention to the near and to the far keys, before the one division that joins them.

Far keys are read by causal linear attention between two stretches of the same sequence: queries
from the n-th position on, keys up to the n-th from the end. Query t then reads the keys ``s <= t -
n``, all of them and no other, wherever chunks begin. The other side is the same thing backwards.
Nothing is subtracted.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width, W window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear.api import attend
from fast_attention.linear.state import EMPTY_LOG_SCALE
from fast_attention.linear.types import Output, Parts, Plan
from fast_attention.mechanisms.local.op import local_attention


class Sequences(NamedTuple):
    """The arrays of one call.

    Attributes:
      query: ``[B, T, H, D]``.
      key: ``[B, T, K, D]``.
      value: ``[B, T, K, V]``.
      key_mask: bool ``[B, T, K or 1]`` or None.
      key_bias: ``[B, T, K or 1]`` or None.
      segment_ids: int ``[B, T]`` or None; runs are numbered, no number comes again.
    """

    query: Array
    key: Array
    value: Array
    key_mask: Array | None = None
    key_bias: Array | None = None
    segment_ids: Array | None = None


def check_options(exact_window: object, feature_map: FeatureMap) -> None:
    """Checks what is asked for.

    Args:
      exact_window: W.
      feature_map: of the far keys.

    Raises:
      ValueError: for a window below 1, or features that do not estimate softmax weights.
    """
    if isinstance(exact_window, bool) or not isinstance(exact_window, int) or exact_window < 1:
        raise ValueError(
            f"exact_window is the number of positions attended to exactly, a whole number of at "
            f"least 1, got {exact_window!r}; leave it out for linear attention alone."
        )
    if feature_map.signed or feature_map.log_kind != "feature":
        raise ValueError(
            f"exact_window adds exact softmax weights to those of {type(feature_map).__name__}, "
            "which takes positive features of the softmax kernel: use "
            "make_fast_softmax_attention with a positive estimator such as 'favor+'."
        )


def far_plan(plan: Plan, output: Output = "parts") -> Plan:
    """The plan of one pass over the far keys, with complete features."""
    return dataclasses.replace(plan, complete=True, causal=True, output=output)


def near_parts(arrays: Sequences, back: int, ahead: int, precision: jax.lax.PrecisionLike) -> Parts:
    """Attends exactly to the keys ``t - back .. t + ahead`` of every position t."""
    key, value = arrays.key, arrays.value
    options: dict[str, Any] = {}
    groups = arrays.query.shape[2] // key.shape[2]

    def of_logits(x: Array) -> Array:
        """``[B, T, K or 1]`` to ``[B, H or 1, 1, T]``."""
        x = jnp.swapaxes(x, 1, 2)[:, :, None]
        return x if x.shape[1] == 1 else jnp.repeat(x, groups, axis=1)

    if arrays.key_mask is not None:
        # Whatever lies in padding, nan and inf included, must not reach a product.
        visible = arrays.key_mask[..., None]
        key, value = jnp.where(visible, key, 0), jnp.where(visible, value, 0)
        if arrays.key_mask.shape[-1] == 1:
            options["key_mask"] = arrays.key_mask[..., 0]
        else:
            options["mask"] = of_logits(arrays.key_mask)
    if arrays.key_bias is not None:
        options["bias"] = of_logits(arrays.key_bias)
    out, logsumexp = local_attention(
        arrays.query,
        key,
        value,
        window_size=1,
        look_backward=back,
        look_forward=ahead,
        exact_window=True,
        segment_ids=arrays.segment_ids,
        precision=precision,
        return_logsumexp=True,
        **options,
    )
    return parts_of_softmax(out, logsumexp)


def parts_of_softmax(out: Array, logsumexp: Array) -> Parts:
    """Writes softmax attention ``[*B, H, V]`` as a sum of weighted values and of weights."""
    scale = jax.lax.stop_gradient(jnp.maximum(logsumexp, EMPTY_LOG_SCALE))
    # 1 with the derivative of the logarithm, or 0 where nothing is seen.
    total = jnp.exp(logsumexp - scale)
    return Parts(out.astype(total.dtype) * total[..., None], total, scale)


def parts_before(
    plan: Plan,
    arrays: Sequences,
    parameters: Parameters,
    distance: int,
    implementation: str | Sequence[str] | None,
) -> Parts:
    """Attends through features to the keys at least ``distance`` before every position.

    Args:
      plan: causal, with parts as its output.
      arrays: the sequences.
      parameters: of the feature map.
      distance: below T.
      implementation: of linear attention.
    """
    length = arrays.query.shape[1]
    later = arrays.query[:, distance:]
    keys = jax.tree.map(lambda x: x[:, : length - distance], arrays)
    key_mask, ids = keys.key_mask, arrays.segment_ids
    if ids is not None:
        ids = ids[:, distance:]
        # A key enters the state with a query of its own segment, or never.
        same = (ids == keys.segment_ids)[..., None]
        key_mask = same if key_mask is None else key_mask & same
    parts, _ = attend(
        plan,
        later,
        keys.key,
        keys.value,
        parameters=parameters,
        key_mask=key_mask,
        key_bias=keys.key_bias,
        segment_ids=ids,
        implementation=implementation,
    )

    def from_distance(x: Array | None, fill: float) -> Any:
        """``[B, T - distance, ...]`` to ``[B, T, ...]``."""
        assert x is not None
        widths = [(0, 0), (distance, 0)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=fill)

    return settled(
        Parts(
            numerator=from_distance(parts.numerator, 0.0),
            denominator=from_distance(parts.denominator, 0.0),
            log_scale=from_distance(parts.log_scale, EMPTY_LOG_SCALE),
        )
    )


def settled(parts: Parts) -> Parts:
    """Lowers the scale where nothing is seen, so that it is no maximum of anything."""
    assert parts.log_scale is not None
    return parts._replace(
        log_scale=jnp.where(parts.denominator == 0, EMPTY_LOG_SCALE, parts.log_scale)
    )
