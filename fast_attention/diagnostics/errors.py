"""Error of an attention function against softmax attention on given queries and keys.

This is for the analysis of a few heads, not for training: exact attention is also computed.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
R selected rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.mechanisms.favor.factories import make_fast_softmax_attention
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.softmax_attention import make_softmax_attention

COLUMNS = 64
"""Keys whose weights are computed in one call."""

LARGEST_RUN = 2048
MOST_ROWS = 128


class ApproximationError(NamedTuple):
    """Result of :func:`approximation_error`, each ``[H]``, over batch and positions.

    Attributes:
      output: ``|out - exact| / |exact|``, Frobenius norms.
      uniform: the same for uniform weights on all visible keys; an approximation whose error is not
        below this is useless.
      matrix: ``|A - exact| / |exact|`` of the attention matrices, at the selected rows.
      effective_keys: mean of ``exp(entropy)`` of exact rows.
    """

    output: np.ndarray
    uniform: np.ndarray
    matrix: np.ndarray
    effective_keys: np.ndarray


class Recommendation(NamedTuple):
    """Result of :func:`recommend_features`.

    Attributes:
      features: M.
      error: expected matrix error with M features.
      extrapolated: M is beyond the measured range. The error is assumed to decrease as
        ``M^(-1/2)``; this is not true for errors near 1 and above, so M may be too small.
      measured: pairs of M and error.
    """

    features: int
    error: float
    extrapolated: bool
    measured: tuple[tuple[int, float], ...]


def attention_matrix(
    attention_fn: Callable[..., Array],
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    rows: Any = None,
    *,
    value_width: int | None = None,
    **options: Any,
) -> Float[Array, "*B H R S"]:
    """Returns the weights that a function gives to keys.

    The function is applied to columns of the identity as values, some at a time. So the result is
    the matrix of the function, whatever it computes inside.

    Args:
      attention_fn: linear in the values; their width may be any, unless `value_width` is given.
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``.
      rows: positions of queries to return, ``[R]`` or ``[*B, R]``; None is all. All are computed.
      value_width: width of the values, for functions that accept only one, such as Flax's own
        ``dot_product_attention`` (D); None chooses it by the length.
      **options: arguments of ``attention_fn``: key_mask, is_causal, projection ...

    Returns:
      ``[*B, H, R, S]`` float32 at least.
    """
    length = key.shape[-3]
    rows = jnp.arange(query.shape[-3]) if rows is None else jnp.asarray(rows)
    dtype = at_least_float32(jnp.result_type(query, key))
    width = value_width or min(COLUMNS, length)
    starts = width * jnp.arange(-(-length // width))

    def columns(query: Array, key: Array, start: Array) -> Array:
        hot = jnp.arange(length)[:, None] == start + jnp.arange(width)[None]
        hot = jnp.expand_dims(hot, -2).astype(dtype)
        value = jnp.broadcast_to(
            hot.reshape((1,) * (key.ndim - 3) + hot.shape), (*key.shape[:-1], width)
        )
        out = attention_fn(query.astype(dtype), key.astype(dtype), value, **options)
        if rows.ndim == 1:
            out = jnp.take(out, rows, axis=-3)
        else:
            out = jnp.take_along_axis(out, rows[..., None, None], axis=-3)
        return jnp.moveaxis(out, -2, -3)

    # Queries and keys as arguments: as constants the compiler would compute with them.
    blocks = jax.jit(lambda *x: jax.lax.map(functools.partial(columns, *x), starts))(query, key)
    blocks = jnp.moveaxis(blocks, 0, -2)
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :length]


def approximation_error(
    attention_fn: Callable[..., Array],
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    key_mask: Bool[Array, "*B S"] | None = None,
    *,
    is_causal: bool = False,
    rows: Any = None,
) -> ApproximationError:
    """Compares an attention function with softmax attention, for each head.

    Args:
      attention_fn: the function to compare.
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      key_mask: ``[*B, S]``; keys where it is False are not seen and, with as many queries as keys,
        the outputs there do not count.
      is_causal: position t sees keys 0..t; a causal function is always compared with causal
        attention.
      rows: positions of queries for comparing matrices and counting keys; None is up to 128, evenly
        spaced. Outputs are compared at all positions.

    Returns:
      Errors of each head.
    """
    attention_fn = as_attention_fn(attention_fn)
    causal = is_causal or attention_fn.unidirectional
    options: dict[str, Any] = {} if key_mask is None else {"key_mask": key_mask}
    if causal:
        options["is_causal"] = True
    softmax = make_softmax_attention()
    length, heads = query.shape[-3:-1]
    rows = _some_rows(length) if rows is None else np.asarray(rows)
    counted = np.ones(query.shape[:-2], bool)
    if key_mask is not None and key.shape[-3] == length:
        counted = np.broadcast_to(np.asarray(key_mask, bool), counted.shape)
    exact = softmax(query, key, value, **options)
    found = attention_fn(query, key, value, **options)
    equal = softmax(jnp.zeros_like(query), key, value, **options)
    target = attention_matrix(softmax, query, key, rows, **options)
    matrix = attention_matrix(attention_fn, query, key, rows, **options)
    target, matrix = (np.moveaxis(np.asarray(x, np.float64), -3, -2) for x in (target, matrix))
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(target > 0, target * np.log(target), 0).sum(-1)
    weights = counted[..., rows, None]
    keys = (np.exp(entropy) * weights).reshape(-1, heads).sum(0) / max(weights.sum(), 1)
    return ApproximationError(
        output=relative_error(found, exact, counted),
        uniform=relative_error(equal, exact, counted),
        matrix=relative_error(matrix, target, counted[..., rows]),
        effective_keys=keys,
    )


def recommend_features(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    target_error: float,
    *,
    make_attention: Callable[[int], Callable[..., Array]] | None = None,
    is_causal: bool = False,
    key_mask: Bool[Array, "*B S"] | None = None,
    smallest: int = 16,
    largest: int = LARGEST_RUN,
) -> Recommendation:
    """Finds the number of features for a target error of attention matrices.

    M is doubled until the relative Frobenius error of the matrices, over all heads, is reached.

    Args:
      query: ``[*B, T, H, D]``, as a trained layer gives them.
      key: ``[*B, S, K, D]``.
      target_error: above 0.
      make_attention: function from M to an attention function; None is
        ``make_fast_softmax_attention(nb_features=M)``. With ``exact_window`` it shows how many
        features a near field saves.
      is_causal: position t sees keys 0..t.
      key_mask: ``[*B, S]``; keys where it is False are not seen and, with T = S, the queries there
        do not count.
      smallest: first M.
      largest: last M; beyond it errors are extrapolated from the last one.

    Returns:
      M, and the measurements.

    Raises:
      ValueError: for a target or sizes out of range.
    """
    if target_error <= 0 or not 1 <= smallest <= largest:
        raise ValueError(
            "target_error must be above 0 and 1 <= smallest <= largest, got "
            f"target_error={target_error}, smallest={smallest}, largest={largest}."
        )
    make = make_attention or (lambda m: make_fast_softmax_attention(nb_features=m))
    options: dict[str, Any] = {"is_causal": True} if is_causal else {}
    rows = _some_rows(query.shape[-3])
    counted = np.ones((1, len(rows), 1), bool)
    if key_mask is not None:
        options["key_mask"] = key_mask
        if key.shape[-3] == query.shape[-3]:
            counted = np.asarray(key_mask, bool)[..., None, rows, None]

    def matrix(function: Callable[..., Array]) -> np.ndarray:
        return np.where(counted, attention_matrix(function, query, key, rows, **options), 0)

    exact = matrix(make_softmax_attention())
    measured: list[tuple[int, float]] = []
    features = smallest
    while features <= largest:
        error = float(np.linalg.norm(matrix(make(features)) - exact) / np.linalg.norm(exact))
        measured.append((features, error))
        if error <= target_error:
            return Recommendation(features, error, False, tuple(measured))
        features *= 2
    last, error = measured[-1]
    # Error falls as M^(-1/2) at best, once estimates are close.
    features = int(np.ceil(last * (error / target_error) ** 2))
    expected = error * float(np.sqrt(last / features))
    return Recommendation(features, expected, True, tuple(measured))


def _some_rows(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(length, MOST_ROWS)).round().astype(int))


def relative_error(found: Any, exact: Any, counted: np.ndarray) -> np.ndarray:
    """Returns the relative Frobenius error of each head.

    Args:
      found: ``[*B, R, H, N]``.
      exact: the same.
      counted: ``[*B, R]``, rows that count.

    Returns:
      ``[H]`` float64.
    """
    found, exact = (
        np.where(counted[..., None, None], np.asarray(x, np.float64), 0) for x in (found, exact)
    )
    axes = tuple(a for a in range(exact.ndim) if a != exact.ndim - 2)
    size = np.sqrt((exact**2).sum(axes))
    return np.sqrt(((found - exact) ** 2).sum(axes)) / np.where(size == 0, 1, size)
