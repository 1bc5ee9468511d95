"""Exact attention with one projection for queries and keys: Reformer's, where it does not hash.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j,   k_j = q_j / |q_j|      (arXiv:2001.04451)

The logit of a position with itself is -5e4: it sees itself where it sees nothing else.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width, N = B H rows, C queries in a block.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.lsh.shared_query_key import (
    SELF_LOGIT,
    LSHOutput,
    place_queries,
    rotate_pairs,
    spread_mask,
    unit_keys,
)

# Scores held at once.
_CPU_SCORES = 2**20
_DEVICE_SCORES = 2**27


@functools.partial(
    jax.jit,
    static_argnames=(
        "causal",
        "query_length",
        "rotary",
        "scale",
        "dropout_rate",
        "broadcast_dropout",
        "precision",
        "return_weights",
    ),
)
@runs_on_auto_axes
def shared_qk_attention(
    qk: Float[Array, "*B S H D"],
    value: Float[Array, "*B S K V"],
    *,
    causal: bool = False,
    query_length: int | None = None,
    key_mask: Bool[Array, "*B S"] | None = None,
    mask: Array | None = None,
    rotary: bool = False,
    positions: Int[Array, "*B T"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    broadcast_dropout: bool = False,
    precision: jax.lax.PrecisionLike = None,
    return_weights: bool = False,
) -> Float[Array, "*B T H V"] | LSHOutput:
    """Attends from the first positions to all, one block of queries after another.

    No matrix ``[T, S]`` is kept, forward or backward, unless the weights are asked for.

    Args:
      qk: ``[*B, S, H, D]``, queries and keys in one: the first T positions ask, all are asked.
      value: ``[*B, S, K, V]``; K divides H.
      causal: a query sees positions up to its own, and all given keys.
      query_length: T, by default S. Positions from T on are given keys, such as memory or context.
      key_mask: ``[*B, S]``, False is padding: not seen, and seeing nothing (its output is 0).
      mask: broadcastable to ``[*B, H, T, S]``, True sees. Unlike hashed attention, a position does
        not see itself where this says no.
      rotary: rotate pairs of neighbouring features by position.
      positions: ``[*B, T]`` of the queries, by default 0, 1, ..; given keys are not rotated.
      scale: of the logits, by default ``D ** -0.5``.
      dropout_rate: of the weights; by ``dropout_key``.
      dropout_key: random key, needed where the rate is above 0.
      broadcast_dropout: drop the same weights in all rows.
      precision: of the products.
      return_weights: also the weights, float32 and before dropout.

    Returns:
      ``[*B, T, H, V]``, zeros for a query that sees nothing; an :class:`LSHOutput`
      with ``return_weights``.

    Raises:
      ValueError: for shapes that do not fit.
    """
    *batch, length, heads, width = qk.shape
    queries = length if query_length is None else query_length
    if value.shape[:-2] != qk.shape[:-2] or heads % max(1, value.shape[-2]):
        raise ValueError(
            "Expected qk [*batch, length, heads, width] and value [*batch, length, value heads, "
            f"value width], value heads dividing heads, got {qk.shape} and {value.shape}."
        )
    if not min(1, length) <= queries <= length:
        raise ValueError(f"query_length={queries} must be between 1 and the {length} positions.")
    if not 0 <= dropout_rate < 1 or (dropout_rate > 0 and dropout_key is None):
        raise ValueError(
            f"dropout_rate={dropout_rate} must be at least 0 and below 1, and needs dropout_key, a "
            "JAX random key, where it is not 0."
        )
    if positions is not None and not rotary:
        raise ValueError("positions are those of rotary=True: pass both, or neither.")
    dtype = jnp.result_type(qk, value)
    qk, value = qk.astype(dtype), value.astype(dtype)
    compute = at_least_float32(dtype)
    if 0 in (*batch, length):
        weights = jnp.zeros((*batch, heads, queries, length), compute)
        out = jnp.zeros((*batch, queries, heads, value.shape[-1]), dtype)
        return LSHOutput(out, weights, None) if return_weights else out
    visible = None
    if key_mask is not None:
        visible = jnp.broadcast_to(key_mask.astype(bool), (*batch, length)).reshape(-1, length)
        shown = visible.reshape(*batch, length, 1, 1)
        qk, value = jnp.where(shown, qk, 0), jnp.where(shown, value, 0)
    if rotary:
        qk = rotate_pairs(qk, place_queries(positions, (*batch, length), queries))
    value = jnp.repeat(value, heads // value.shape[-2], axis=-2)
    number = math.prod(batch) * heads
    factor = width**-0.5 if scale is None else scale

    def rows(x: Array) -> Array:
        return jnp.moveaxis(x, -2, -3).reshape(number, length, -1)

    block = _block(queries, length)
    blocks = math.ceil(queries / block)
    if mask is not None:
        mask = spread_mask(mask, (*batch, heads, queries, length))
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, blocks * block - queries), (0, 0)])

    def weigh(query: Array, key: Array, n: Array, start: Array) -> Array:
        own = start + jnp.arange(block)[:, None]
        place = jnp.arange(length)[None]
        logits = jnp.einsum(
            "td,sd->ts", query, key, precision=precision, preferred_element_type=compute
        )
        logits = jnp.where(own == place, SELF_LOGIT, logits * factor)
        if causal:
            logits = jnp.where((own >= place) | (place >= queries), logits, -jnp.inf)
        if visible is not None:
            seen = visible[n // heads]
            asked = seen.at[own[:, 0]].get(mode="fill", fill_value=False)
            logits = jnp.where(asked[:, None] & seen[None], logits, -jnp.inf)
        if mask is not None:
            b, h = mask.shape[:2]
            pairs = mask[n // heads if b > 1 else 0, n % heads if h > 1 else 0]
            pairs = lax.dynamic_slice_in_dim(pairs, start, block)
            logits = jnp.where(pairs, logits, -jnp.inf)
        largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - jnp.where(largest == -jnp.inf, 0, largest))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return weights / jnp.where(total == 0, 1, total)

    @jax.checkpoint
    def attend_block(query: Array, key: Array, value: Array, n: Array, start: Array):
        query = lax.dynamic_slice_in_dim(query, start, block)
        kept = weights = weigh(query, key, n, start)
        if dropout_rate > 0 and dropout_key is not None:
            seed = jax.random.fold_in(dropout_key, start)
            seed = seed if broadcast_dropout else jax.random.fold_in(seed, n)
            keep = jax.random.bernoulli(seed, 1 - dropout_rate, weights.shape)
            kept = jnp.where(keep, weights / (1 - dropout_rate), 0)
        out = jnp.einsum(
            "ts,sv->tv",
            kept.astype(dtype),
            value,
            precision=precision,
            preferred_element_type=compute,
        )
        return (out.astype(dtype), weights) if return_weights else out.astype(dtype)

    def attend_row(row: tuple[Array, Array, Array, Array]):
        query, key, value, n = row
        query = jnp.pad(query[:queries], [(0, blocks * block - queries), (0, 0)])
        starts = jnp.arange(blocks) * block
        return lax.map(lambda start: attend_block(query, key, value, n, start), starts)

    x = rows(qk)
    operands = (x, unit_keys(x), rows(value), jnp.arange(number))
    at_once = max(1, _most_scores() // (block * length))
    if at_once >= number:
        found = jax.vmap(attend_row)(operands)
    else:
        found = lax.map(attend_row, operands, batch_size=None if at_once == 1 else at_once)

    def together(x: Array) -> Array:
        x = x.reshape(number, blocks * block, -1)[:, :queries]
        return x.reshape(*batch, heads, queries, x.shape[-1])

    if return_weights:
        out, weights = (together(x) for x in found)
        return LSHOutput(jnp.moveaxis(out, -3, -2), weights, None)
    return jnp.moveaxis(together(found), -3, -2)


def _most_scores() -> int:
    return _CPU_SCORES if jax.default_backend() == "cpu" else _DEVICE_SCORES


def _block(queries: int, length: int) -> int:
    """Queries of a block: all of them if their scores can be held."""
    return max(1, min(queries, _most_scores() // length))
