"""Softmax attention of one tile: a few queries and the stretch of keys about them.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width, C queries
in a tile, S keys in a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array
from fast_attention.mechanisms.shared_qk import SELF_LOGIT


class Choices(NamedTuple):
    """What is known when the program is compiled.

    Attributes:
      block: all queries of a block ``t // block`` have the reach of the block.
      back: keys within reach before a block.
      ahead: keys within reach behind a block.
      causal: no key behind a query is within reach, in its block or not.
      shared: queries and keys are the same vectors: a position's own logit is ``SELF_LOGIT``.
      dropout_rate: of the weights.
      share_dropout: the batch and the heads share the dropped weights.
      precision: of both products.
    """

    block: int
    back: int
    ahead: int
    causal: bool
    shared: bool = False
    dropout_rate: float = 0.0
    share_dropout: bool = True
    precision: jax.lax.PrecisionLike = None


class Sight(NamedTuple):
    """What decides which keys a query sees and how its logits are changed, ``None`` for nothing.

    Axes of length 1 stand for all. In a tile, positions are those among its keys, and the batch
    axis is gone.

    Attributes:
      first: ``[B, T]`` int, the first position a query sees.
      last: ``[B, T]`` int, the last position.
      key_mask: ``[B, T]`` bool, True is seen.
      mask: ``[B, H, T, T]`` bool, True sees.
      bias: ``[B, H, T, T]``, added to the logits.
    """

    first: Array
    last: Array
    key_mask: Array | None = None
    mask: Array | None = None
    bias: Array | None = None


class Tile(NamedTuple):
    """The operands of one tile.

    Attributes:
      query: ``[C, H, D]``.
      key: ``[S, K, D]``.
      value: ``[S, K, V]``.
      sight: without batch axis; of the tile.
      dropout_key: random key of the tile.
    """

    query: Array
    key: Array
    value: Array
    sight: Sight
    dropout_key: Array | None = None


def attend_tile(tile: Tile, own: Array, choices: Choices) -> tuple[Array, Array]:
    """Attends from a few queries to a few keys.

    Args:
      tile: see there.
      own: ``[C]`` int, each query's own place among the keys; used if they are shared.
      choices: see there; the reach is not used.

    Returns:
      ``[C, H, V]`` and the logsumexp ``[C, H]``.
    """
    query, key, value, sight = tile.query, tile.key, tile.value, tile.sight
    (queries, heads, width), (keys, kv_heads, _) = query.shape, key.shape
    compute = at_least_float32(query.dtype)
    product = functools.partial(
        jnp.einsum, precision=choices.precision, preferred_element_type=compute
    )
    # Heads in front, those that share keys in one product.
    folded = jnp.swapaxes(query, 0, 1).reshape(kv_heads, -1, width)
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
    logits = product("kqd,ksd->kqs", folded, key) * width**-0.5
    logits = logits.reshape(heads, queries, keys)
    if sight.bias is not None:
        logits = logits + sight.bias.astype(compute)
    position = jnp.arange(keys, dtype=jnp.int32)[None, None]
    if choices.shared:
        logits = jnp.where(position == own[None, :, None], SELF_LOGIT, logits)
    seen = position >= sight.first[None, :, None]
    seen = seen & (position <= sight.last[None, :, None])
    if sight.key_mask is not None:
        seen = seen & sight.key_mask[None, None]
    if sight.mask is not None:
        seen = seen & sight.mask
    logits = jnp.where(seen, logits, -jnp.inf)
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    blind = total == 0
    total = jnp.where(blind, 1, total)
    logsumexp = jnp.where(blind, -jnp.inf, largest + jnp.log(total))
    if tile.dropout_key is not None:
        shape = weights.shape[1:] if choices.share_dropout else weights.shape
        kept = jax.random.bernoulli(tile.dropout_key, 1 - choices.dropout_rate, shape)
        kept = kept.reshape((1,) * (weights.ndim - kept.ndim) + kept.shape)
        weights = jnp.where(kept, weights / max(1 - choices.dropout_rate, 1e-6), 0)
    weights = weights.astype(value.dtype).reshape(kv_heads, -1, keys)
    out = product("kqs,ksv->kqv", weights, value).reshape(heads, queries, -1) / total
    return jnp.swapaxes(out, 0, 1).astype(value.dtype), logsumexp[..., 0].T
