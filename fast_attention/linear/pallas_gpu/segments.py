"""Sequences in segments, so that all multiprocessors have work.

One program walks over one batch row and head. Where there are fewer of those than multiprocessors,
the sequence is cut: one launch makes the state of every segment's keys, and one more reads all
segments in parallel, where a program first adds up the states that it sees. A causal segment reads
no later one, and the derivative is that of the parts.

Shape letters: B batch, N segments, R = B N, T queries, S keys, H heads, K key/value heads, D head
width, V value width, M features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_gpu import core
from fast_attention.linear.pallas_gpu.program import Division
from fast_attention.linear.pallas_gpu.state import State
from fast_attention.linear.pallas_gpu.tiles import TILE
from fast_attention.linear.state import EMPTY_LOG_SCALE, MASKED_LOG, LinearAttentionState
from fast_attention.linear.types import Parts

MULTIPROCESSORS = 132
"""Of an H100 or H200."""

SHORTEST = 256
"""Positions of a segment at least: each costs a state, written and read."""


class Arguments(NamedTuple):
    """What is differentiated. Log-features are ``x @ weights^T``, plus ``key_log`` for keys.

    Attributes:
      query: ``[B, T, H, D]``.
      key: ``[B, S, K, D]``.
      value: ``[B, S, K, V]``.
      key_log: float32 ``[B, K, S]``, ``MASKED_LOG`` where a key is masked.
      weights: float32 ``[B or 1, K or 1, M, D]``.
      state: before the first key, or None for an empty one; its scale ``[B, K, M]`` is a constant.
    """

    query: Array
    key: Array
    value: Array
    key_log: Array
    weights: Array
    state: LinearAttentionState | None


class Attended(NamedTuple):
    """Attention, and the state after the last key.

    Attributes:
      out: ``[B, T, H, V]`` if there is a division, else
        :class:`fast_attention.linear.types.Parts`, whose scale is a constant.
      wide: 1 where a row has a pair of :mod:`fast_attention.linear.chunked.wide_pairs`, which
        kernels lose, else 0; None if not causal. For :func:`joined`.
      any_wide: bool ``[]``, whether there is any; None if not causal.
      state: None if not asked for; its scale is a constant.
    """

    out: Array | Parts
    wide: Array | None
    any_wide: Array | None
    state: LinearAttentionState | None


def attend(
    arguments: Arguments,
    *,
    causal: bool,
    parts: int,
    division: Division | None,
    with_state: bool,
    interpret: bool,
) -> Attended:
    """Computes linear attention.

    Args:
      arguments: the arrays.
      causal: position t sees keys 0..t.
      parts: bfloat16 parts in which features and values are multiplied.
      division: how numerators are divided by denominators, None if they are not.
      with_state: whether to return the state after the last key.
      interpret: run the kernels on plain operations.

    Raises:
      NotImplementedError: if the kernels, backward included, need more shared memory than there is.
    """
    query, key, value, key_log, weights, initial = arguments
    batch, length, heads, _ = query.shape
    value_dim, features = value.shape[-1], weights.shape[-2]
    count = segment_count(batch * heads, max(length, key.shape[1]))
    choices = core.Choices(
        causal=causal,
        parts=parts,
        division=division,
        segments=count,
        groups=heads // key.shape[2],
        features=features,
        with_state=with_state,
        interpret=interpret,
    )
    query, key, value = (_cut(_pad(x, {3: 0}), count) for x in (query, key, value))
    keys = core.Keys(key, value, _cut(key_log, count, axis=2, fill=MASKED_LOG))
    weights = _pad(weights, {2: 0, 3: 0})
    core.check_shared_memory(choices, query, keys, weights)
    state = None if initial is None else _features_first(initial)
    out: Any = core.attend(choices, query, keys, weights, state)

    numerator = out.numerator.reshape(batch, -1, *out.numerator.shape[2:])
    numerator = numerator[:, :length, :, :value_dim]
    log_scale = jax.lax.stop_gradient(joined(out.log_scale, batch, length))
    denominator = joined(out.denominator, batch, length)
    return Attended(
        numerator if division else Parts(numerator, denominator, log_scale),
        out.wide,
        None if out.any_wide is None else jnp.max(out.any_wide) > 0,
        None if out.state is None else _features_last(out.state, features, value_dim),
    )


def segment_count(rows: int, length: int) -> int:
    """Returns into how many segments sequences are cut.

    Args:
      rows: batch rows times heads, each a program for every segment.
      length: the longer of queries and keys.
    """
    enough = -(-MULTIPROCESSORS // rows)
    most = length // SHORTEST
    if enough >= most:
        return max(1, most)
    if enough == 1:
        return 1
    # A few segments more, where they have equally many whole chunks: nothing is padded.
    whole = (n for n in range(enough, min(2 * enough, most + 1)) if length % (n * TILE) == 0)
    return next(whole, enough)


def joined(x: Array, batch: int, length: int) -> Array:
    """Returns numbers of rows of segments, ``[R, H, T / N]``, as ``[B, T, H]``."""
    heads = x.shape[1]
    x = jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2)
    return jnp.swapaxes(x.reshape(batch, heads, -1)[..., :length], 1, 2)


def _cut(x: Array, count: int, *, axis: int = 1, fill: float = 0.0) -> Array:
    """Makes segments rows of the batch, all of equally many whole chunks."""
    size = x.shape[axis]
    length = _padded(-(-size // count))
    widths = [(0, (count * length - size) * (i == axis)) for i in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(*x.shape[:axis], count, length, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 1).reshape(-1, *x.shape[1:axis], *x.shape[axis + 1 :])


def _features_first(state: LinearAttentionState) -> State:
    assert state.log_scale is not None
    return State(
        _pad(jnp.swapaxes(state.kv, -1, -2), {2: 0, 3: 0}),
        _pad(state.k_sum, {2: 0}),
        _pad(jax.lax.stop_gradient(state.log_scale), {2: EMPTY_LOG_SCALE}),
    )


def _features_last(state: State, features: int, value_dim: int) -> LinearAttentionState:
    return LinearAttentionState(
        jnp.swapaxes(state.kv[..., :features, :value_dim], -1, -2),
        state.k_sum[..., :features],
        jax.lax.stop_gradient(state.log_scale[..., :features]),
    )


def _padded(size: int) -> int:
    return -(-size // TILE) * TILE


def _pad(x: Array, axes: dict[int, float]) -> Array:
    """Fills axes up to whole tiles, each with a value of its own."""
    for axis, value in axes.items():
        missing = _padded(x.shape[axis]) - x.shape[axis]
        if missing:
            widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths, constant_values=value)
    return x
