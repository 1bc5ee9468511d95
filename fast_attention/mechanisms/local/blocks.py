"""Softmax attention in tiles: a few queries and the stretch of keys about them.

What a query sees is given as an interval of positions; a tile only has to cover the intervals of
its queries, so that its size is free: one that keeps the scores of a tile in the cache. No matrix
of scores is held longer than a tile, forward or backward.

Shape letters: B batch, T length, H heads, K key/value heads, G = H / K, D head width, V value
width, C queries in a tile, S keys in a tile (C and those within reach), N tiles in a group.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fast_attention.arrays.types import Array
from fast_attention.mechanisms.local.tile import Choices, Sight, Tile, attend_tile


class Tiling(NamedTuple):
    """How much is done at once.

    Attributes:
      queries: in a tile, at most.
      scores: computed together, if there are that many.
    """

    queries: int
    scores: int


# What stays in the cache of a CPU; what keeps another device busy.
_CPU_TILING = Tiling(queries=128, scores=2**20)
_DEVICE_TILING = Tiling(queries=128, scores=2**27)


@functools.partial(jax.jit, static_argnames=("choices", "tiling", "around"))
def tiled_attention(
    query: Array,
    key: Array,
    value: Array,
    sight: Sight,
    dropout_key: Array | None,
    choices: Choices,
    tiling: Tiling | None = None,
    around: bool = False,
) -> Array:
    """Attends, tile after tile.

    Args:
      query: ``[B, T, H, D]``.
      key: ``[B, T, K, D]``, the type of `query`.
      value: ``[B, T, K, V]``, the type of `query`.
      sight: what each query sees; nothing out of the reach of `choices`.
      dropout_key: random key, or None.
      choices: see there.
      tiling: None is the platform's.
      around: `key`, `value` and the key mask begin ``choices.back`` positions before the queries
        and end ``choices.ahead`` behind them, none if causal; blocks are of one position.

    Returns:
      ``[B, T, H, V]``; zeros for a query that sees nothing.
    """
    rows, length, heads, _ = query.shape
    if tiling is None:
        tiling = _CPU_TILING if jax.default_backend() == "cpu" else _DEVICE_TILING
    size, back, ahead = _cut(length, choices, tiling, around)
    width = back + size + ahead
    tiles = math.ceil(length / size)
    groups = math.ceil(tiles / max(1, tiling.scores // (heads * size * width)))
    # Equal groups pad least.
    tiles = math.ceil(tiles / groups)
    group = tiles * size
    padded = groups * group

    def of_queries(x: Array, fill: int = 0) -> Array:
        """``[B, T, ...]`` to ``[B * groups, N, C, ...]``."""
        pad = [(0, 0), (0, padded - length), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pad, constant_values=fill)
        return x.reshape(rows * groups, tiles, size, *x.shape[2:])

    def of_keys(x: Array) -> Array:
        """``[B, T, ...]`` to ``[B * groups, back + N * C + ahead, ...]``, overlapping."""
        before, behind = (0, 0) if around else (back, ahead)
        pad = [(0, 0), (before, padded - length + behind), *[(0, 0)] * (x.ndim - 2)]
        x = jax.vmap(functools.partial(_windows, size=group, count=groups))(jnp.pad(x, pad))
        return x.reshape(rows * groups, *x.shape[2:])

    def of_logits(x: Array) -> Array:
        """``[B or 1, H or 1, T or 1, T or 1]`` to ``[B * groups, N, H or 1, C or 1, S or 1]``."""
        x = _of_rows(_bands(x, length, size, (back, ahead), tiles * groups), rows)
        return x.reshape(rows * groups, tiles, *x.shape[2:])

    # Where in its tile the first key in sight stands, and the last one.
    first_key = (np.arange(padded) // size * size - back).astype(np.int32)[None, :length]
    items = {
        "query": of_queries(query),
        "key": of_keys(key),
        "value": of_keys(value),
        "first": of_queries(_of_rows(sight.first, rows) - first_key, fill=width),
        "last": of_queries(_of_rows(sight.last, rows) - first_key),
        "number": jnp.arange(rows * groups, dtype=jnp.int32),
    }
    if sight.key_mask is not None:
        items["key_mask"] = of_keys(_of_rows(sight.key_mask, rows))
    if sight.mask is not None:
        items["mask"] = of_logits(sight.mask.astype(bool))
    if sight.bias is not None:
        items["bias"] = of_logits(sight.bias)
    own = jnp.arange(back, back + size, dtype=jnp.int32)

    @jax.checkpoint
    def attend(item: dict[str, Array]) -> Array:
        of_tiles = functools.partial(_windows, size=size, count=tiles)
        key_mask, dropout_keys = item.get("key_mask"), None
        if dropout_key is not None:
            number = item["number"] % groups if choices.share_dropout else item["number"]
            dropout_keys = jax.random.split(jax.random.fold_in(dropout_key, number), tiles)
        batch = Tile(
            query=item["query"],
            key=of_tiles(item["key"]),
            value=of_tiles(item["value"]),
            sight=Sight(
                first=item["first"],
                last=item["last"],
                key_mask=None if key_mask is None else of_tiles(key_mask),
                mask=item.get("mask"),
                bias=item.get("bias"),
            ),
            dropout_key=dropout_keys,
        )
        return jax.vmap(lambda tile: attend_tile(tile, own, choices)[0])(batch)

    at_once = max(1, tiling.scores // (heads * group * width))
    if rows * groups <= at_once:
        out = jax.vmap(attend)(items)
    else:
        out = lax.map(attend, items, batch_size=None if at_once == 1 else at_once)
    return out.reshape(rows, padded, *out.shape[3:])[:, :length]


def _cut(length: int, choices: Choices, tiling: Tiling, around: bool) -> tuple[int, int, int]:
    """Returns the queries of a tile, and how many keys before and behind them it takes in."""
    block = choices.block
    size = tiling.queries // block * block or tiling.queries
    # A tile may start within a block, which is seen from where it begins to where it ends.
    back = choices.back + block - math.gcd(block, size)
    ahead = 0 if choices.causal else choices.ahead + block - math.gcd(block, size)
    if around:
        return min(size, length), back, ahead
    if length > size:
        return size, min(back, length), min(ahead, length)
    # One tile has all keys: none is out of its reach.
    return length, 0, 0


def _windows(x: Array, size: int, count: int) -> Array:
    """Overlapping stretches of the first axis, every `size` entries, that use all of them.

    Slices, where a gather would make the gradient a scatter.
    """
    width = len(x) - (count - 1) * size
    pieces = []
    for offset in range(0, width, size):
        piece = min(size, width - offset)
        stretch = x[offset : offset + (count - 1) * size + piece]
        stretch = jnp.pad(stretch, [(0, size - piece), *[(0, 0)] * (x.ndim - 1)])
        pieces.append(stretch.reshape(count, size, *x.shape[1:])[:, :piece])
    return jnp.concatenate(pieces, axis=1)


def _bands(x: Array, length: int, size: int, around: tuple[int, int], count: int) -> Array:
    """What tiles need of a matrix: ``[B, H, T, T]`` to ``[B, count, H, C, S]``; 1 stays 1."""
    extra, (back, ahead) = count * size - length, around
    rows, columns = (n > 1 for n in x.shape[-2:])
    pad = [(0, extra if rows else 0), (back, extra + ahead) if columns else (0, 0)]
    x = jnp.pad(x, [(0, 0), (0, 0), *pad])

    def tile(start: Array) -> Array:
        part = lax.dynamic_slice_in_dim(x, start, size, 2) if rows else x
        width = back + size + ahead
        return lax.dynamic_slice_in_dim(part, start, width, 3) if columns else part

    return jax.vmap(tile, out_axes=1)(size * jnp.arange(count))


def _of_rows(x: Array, rows: int) -> Array:
    return jnp.broadcast_to(x, (rows, *x.shape[1:]))
