"""Errors of attention functions as a function of the number of features.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
P numbers of features, R draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.diagnostics.errors import relative_error
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.favor.calibration import calibrate, tuned_map
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.softmax_attention import make_softmax_attention


@dataclasses.dataclass(frozen=True)
class ErrorCurves:
    """Result of :func:`error_curves`.

    Attributes:
      features: the numbers of features, P of them.
      errors: relative errors of outputs ``[P, R, H]`` by name: Frobenius norms over batch and
        positions, of R draws of the features.
      uniform: ``[H]``, the same for uniform weights on all visible keys.
    """

    features: tuple[int, ...]
    errors: Mapping[str, np.ndarray]
    uniform: np.ndarray

    def over_heads(self, name: str) -> np.ndarray:
        """Root mean square over heads, ``[P, R]``; may be NaN or infinite."""
        return np.sqrt(np.mean(self.errors[name] ** 2, axis=-1))

    def uniform_over_heads(self) -> float:
        """Root mean square over heads of the error of uniform weights."""
        return float(np.sqrt(np.mean(self.uniform**2)))


def error_curves(
    make_attention: Mapping[str, Callable[[int], Callable[..., Array]]],
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    key_mask: Bool[Array, "*B S"] | None = None,
    *,
    features: Sequence[int] = (16, 64, 256, 1024),
    draws: int = 4,
    seed: int = 0,
    is_causal: bool = False,
) -> ErrorCurves:
    """Compares outputs with softmax attention, for several numbers of features.

    Functions with ``calibration="stored"`` are calibrated on the same queries and keys, once for
    each number of features; draws are then new rows for the same calibration.

    Args:
      make_attention: functions from M to an attention function (``FastAttention`` or any other with
        ``draw_projection``), by their names in a plot.
      query: ``[*B, T, H, D]``, for example of a trained layer.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      key_mask: ``[*B, S]``; keys where it is False are not seen and, with as many queries as keys,
        the outputs there do not count.
      features: numbers of features to try.
      draws: R, number of independent projections; functions with equal projection use the same
        ones.
      seed: random seed of the projections.
      is_causal: position t sees keys 0..t. Required for causal functions, too, so that all are
        compared with the same target.

    Returns:
      Errors for each function, number of features, draw and head.

    Raises:
      ValueError: if there is nothing to measure, or a function is causal and the target is not.
    """
    if not make_attention or not features or draws < 1:
        raise ValueError(
            "At least one function, one number of features and one draw are needed, got "
            f"make_attention={list(make_attention)}, features={list(features)}, draws={draws}."
        )
    options: dict[str, Any] = {} if key_mask is None else {"key_mask": key_mask}
    if is_causal:
        options["is_causal"] = True
    counted = np.ones(query.shape[:-2], bool)
    if key_mask is not None and key.shape[-3] == query.shape[-3]:
        counted = np.broadcast_to(np.asarray(key_mask, bool), counted.shape)
    softmax = make_softmax_attention()
    exact = softmax(query, key, value, **options)
    equal = softmax(jnp.zeros_like(query), key, value, **options)
    keys = jax.random.split(jax.random.key(seed), draws)
    errors: dict[str, np.ndarray] = {}
    for name, make in make_attention.items():
        found = []
        for count in features:
            attention_fn = as_attention_fn(make(count))
            if attention_fn.unidirectional and not is_causal:
                raise ValueError(
                    f"{name!r} is causal and would be compared with bidirectional attention; "
                    "pass is_causal=True."
                )
            outputs = (
                attention_fn(query, key, value, projection=projection, **options)
                for projection in _projections(attention_fn, keys, query, key, key_mask)
            )
            found.append([relative_error(out, exact, counted) for out in outputs])
        errors[name] = np.asarray(found)
    return ErrorCurves(tuple(features), errors, relative_error(equal, exact, counted))


def _projections(
    attention_fn: AttentionFn, keys: Array, query: Array, key: Array, key_mask: Array | None
) -> list[Any]:
    """Draws the projections of the function, calibrated if needed."""
    width = query.shape[-1]
    if attention_fn.calibration not in ("stored", "trained"):
        return [attention_fn.draw_projection(k, width) for k in keys]
    first = attention_fn.draw_projection(keys[0], width)
    tuned: Any = calibrate(attention_fn, query, key, key_mask=key_mask, projection=first)
    redraw = tuned_map(attention_fn).redraw
    return [tuned, *(redraw(k, tuned) for k in keys[1:])]
