"""Sequences in segments, so that all multiprocessors have work.

One program walks over one batch row and head. Where there are fewer of those than multiprocessors,
the sequence is cut: one launch makes the state of every segment's keys, a sum over those gives the
state before every segment (or after all of them), and one more launch reads all segments in
parallel. A causal segment reads no later one, and the derivative is that of the parts.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, N segments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_gpu.core import (
    Arguments,
    Attended,
    Choices,
    attend_with_kernels,
)
from fast_attention.linear.pallas_gpu.tiles import TILE
from fast_attention.linear.parallel_chunks.block_states import states_at_points
from fast_attention.linear.state import EMPTY_LOG_SCALE, MASKED_LOG, LinearAttentionState

MULTIPROCESSORS = 132
"""Of an H100 or H200."""

SHORTEST = 256
"""Positions of a segment at least: each costs a state, written and read."""


def attend(choices: Choices, arguments: Arguments) -> Attended:
    """Computes what :func:`.core.attend_with_kernels` does, in segments where that helps."""
    batch, length, heads, _ = arguments.query.shape
    kv_heads = arguments.key.shape[2]
    count = segment_count(batch * heads, max(length, arguments.key.shape[1]))
    if count < 2:
        whole: Any = attend_with_kernels(choices, arguments)
        return whole
    pieces = _cut(arguments, count)
    own = _states(choices, pieces)
    own = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 2, 1).reshape(
            batch * kv_heads, count, *x.shape[2:]
        ),
        own,
    )
    state = LinearAttentionState(arguments.kv, arguments.k_sum, arguments.log_scale)
    state = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state)
    seen = jnp.tril(jnp.ones((1, count + 1, count + 1), bool))
    _, before, after = states_at_points(state, own, seen)
    if not choices.causal:
        before = jax.tree.map(lambda x, y: jnp.broadcast_to(x[:, None], y.shape), after, before)
        pieces = pieces._replace(**_no_key(pieces))
    before = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, kv_heads, *x.shape[1:]), 2, 1).reshape(
            batch * count, kv_heads, *x.shape[2:]
        ),
        before,
    )
    read: Any = attend_with_kernels(choices, pieces._replace(**before._asdict()))

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 2)
        return x.reshape(batch, heads, -1)[..., :length]

    return Attended(
        read.numerator.reshape(batch, -1, *read.numerator.shape[2:])[:, :length],
        joined(read.denominator),
        joined(read.log_scale),
        joined(read.wide),
        jax.tree.map(lambda x: x.reshape(batch, kv_heads, *x.shape[1:]), tuple(after)),
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


def _cut(arguments: Arguments, count: int) -> Arguments:
    """Makes segments rows of the batch, all of equally many whole chunks."""

    def cut(x: Array, axis: int = 1, value: float = 0.0) -> Array:
        size = x.shape[axis]
        length = -(-size // (count * TILE)) * TILE
        widths = [(0, (count * length - size) * (i == axis)) for i in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=value)
        x = x.reshape(*x.shape[:axis], count, length, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 1).reshape(-1, *x.shape[1:axis], *x.shape[axis + 1 :])

    weights = arguments.weights
    return arguments._replace(
        query=cut(arguments.query),
        key=cut(arguments.key),
        value=cut(arguments.value),
        key_log=cut(arguments.key_log, 2, MASKED_LOG),
        weights=weights if weights.shape[0] == 1 else jnp.repeat(weights, count, axis=0),
    )


def _states(choices: Choices, pieces: Arguments) -> LinearAttentionState:
    """Returns the states of the keys of segments; one query of each is read for nothing."""
    rows, _, kv_heads, head_dim = pieces.key.shape
    features = pieces.weights.shape[-2]
    shape = (rows, kv_heads, features)
    attended: Any = attend_with_kernels(
        Choices(False, choices.parts, choices.interpret),
        pieces._replace(
            query=jnp.zeros((rows, 1, kv_heads, head_dim), pieces.query.dtype),
            kv=jnp.zeros((rows, kv_heads, pieces.value.shape[-1], features), jnp.float32),
            k_sum=jnp.zeros(shape, jnp.float32),
            log_scale=jnp.full(shape, EMPTY_LOG_SCALE, jnp.float32),
        ),
    )
    return LinearAttentionState(*attended.state)


def _no_key(pieces: Arguments) -> dict[str, Any]:
    """Returns one masked key in place of all."""
    return {
        "key": jnp.zeros_like(pieces.key[:, :1]),
        "value": jnp.zeros_like(pieces.value[:, :1]),
        "key_log": jnp.full_like(pieces.key_log[..., :1], MASKED_LOG),
    }
