"""Softmax attention in blocks: rows of the batch and blocks of queries, one after another.

No matrix of scores is held whole, forward or backward: a block is computed again when its
gradient is needed. A causal block is not multiplied with keys behind its last query.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, G = H / K,
C queries in a block, D head width, V value width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array
from fast_attention.mechanisms.checks import full_rank
from fast_attention.mechanisms.shared_qk import SELF_LOGIT


class Tiling(NamedTuple):
    """How much is done at once.

    Attributes:
      rows: scores of the smallest blocks of the rows done together.
      block: scores of the largest blocks.
      smallest: queries in the smallest block.
      stages: into how many parts a causal sequence is cut at most, each compiled for the keys that
        it sees.
    """

    rows: int
    block: int
    smallest: int
    stages: int = 16


# What stays in the cache of a CPU; what keeps another device busy.
_CPU_TILING = Tiling(rows=2**17, block=2**22, smallest=64)
_DEVICE_TILING = Tiling(rows=2**27, block=2**27, smallest=256)


class Choices(NamedTuple):
    """What is known when the program is compiled.

    Attributes:
      causal: a query sees the keys up to its own position.
      dropout_rate: of the weights.
      share_dropout: the batch and the heads share the dropped weights.
      precision: of both products.
      shared: queries and keys are the same vectors: a position's own logit is ``SELF_LOGIT``.
      scale: of the logits; None is ``D ** -0.5``.
    """

    causal: bool
    dropout_rate: float = 0.0
    share_dropout: bool = True
    precision: jax.lax.PrecisionLike = None
    shared: bool = False
    scale: float | None = None


class Extras(NamedTuple):
    """What changes the scores of one row or, with leading batch axes, of all.

    Attributes:
      bias: ``[H or 1, T or 1, S or 1]``, added.
      mask: ``[H or 1, T or 1, S or 1]`` bool or 0/1, True sees.
      key_mask: ``[S]`` bool, True is seen.
      first_key: ``[T]`` int; a query sees no key before this one.
      last_key: ``[T]`` int; a query sees no key behind this one.
      first_query: int scalar, position of the first query among the keys; None is 0.
      dropout_key: random key.
    """

    bias: Array | None = None
    mask: Array | None = None
    key_mask: Array | None = None
    first_key: Array | None = None
    last_key: Array | None = None
    dropout_key: Array | None = None
    first_query: Array | None = None


@functools.partial(jax.jit, static_argnames=("choices", "tiling"))
def blocked_attention(
    query: Array,
    key: Array,
    value: Array,
    extras: Extras,
    choices: Choices,
    tiling: Tiling | None = None,
) -> Array:
    """Attends, row after row and block after block.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``, the type of `query`.
      value: ``[*B, S, K, V]``, the type of `query`.
      extras: arrays that broadcast to their full shapes; one dropout key for all.
      choices: see there.
      tiling: None is the platform's.

    Returns:
      ``[*B, T, H, V]``; zeros for a query that sees nothing.

    Raises:
      ValueError: if an extra does not broadcast.
    """
    *batch_shape, length, heads, _ = query.shape
    key_length, kv_heads = key.shape[-3:-1]
    rows = math.prod(batch_shape)
    if tiling is None:
        tiling = _CPU_TILING if jax.default_backend() == "cpu" else _DEVICE_TILING
    smallest = tiling.smallest
    if any(export.is_symbolic_dim(n) for n in (rows, length, key_length)):
        # The program does not know how many rows fit: one at a time, each as one block.
        at_once, block = 0, None
    else:
        at_once = max(1, tiling.rows // max(1, heads * min(length, smallest) * key_length))
        block = max(smallest, tiling.block // max(1, at_once * heads * key_length))
    shared, own = _split_extras(extras, batch_shape, (heads, length, key_length), choices)

    def attend(row: tuple[Array, Array, Array, Extras]) -> Array:
        query, key, value, own = row
        merged = Extras(*(b if a is None else a for a, b in zip(own, shared, strict=True)))
        return _attend_row(query, key, value, merged, choices, block, tiling)

    operands = (
        query.reshape(rows, length, kv_heads, heads // kv_heads, -1),
        key.reshape(rows, *key.shape[-3:]),
        value.reshape(rows, *value.shape[-3:]),
        own,
    )
    if at_once and rows <= at_once:
        out = jax.vmap(attend)(operands)
    else:
        out = lax.map(attend, operands, batch_size=at_once if at_once > 1 else None)
    return out.reshape(*batch_shape, length, heads, value.shape[-1])


def run_bounds(segment_ids: Array) -> tuple[Array, Array]:
    """First and last position of the run of equal ids around each position, ``[*B, T]``."""
    axis = segment_ids.ndim - 1
    length = segment_ids.shape[-1]
    position = lax.broadcasted_iota(jnp.int32, segment_ids.shape, axis)
    ends = segment_ids[..., 1:] != segment_ids[..., :-1]
    pad = [(0, 0)] * axis
    starts = jnp.pad(ends, [*pad, (1, 0)])
    ends = jnp.pad(ends, [*pad, (0, 1)])
    first = lax.cummax(jnp.where(starts, position, 0), axis)
    last = lax.cummin(jnp.where(ends, position, length - 1), axis, reverse=True)
    return first, last


def _split_extras(
    extras: Extras, batch_shape: Sequence[int], tail: tuple[int, int, int], choices: Choices
) -> tuple[Extras, Extras]:
    """What all rows share, without batch axes, and what is each row's own, ``[prod(B), ...]``."""
    shared, own = Extras(), Extras()
    heads, length, key_length = tail
    shapes = {
        "bias": tail,
        "mask": tail,
        "key_mask": (key_length,),
        "first_key": (length,),
        "last_key": (length,),
        "first_query": (),
    }
    for name, shape in shapes.items():
        x, rank = getattr(extras, name), len(shape)
        if x is None:
            continue
        x = full_rank(name, x, (*batch_shape, *shape))
        trailing = x.shape[x.ndim - rank :]
        if math.prod(x.shape[: x.ndim - rank]) == 1:
            shared = shared._replace(**{name: x.reshape(trailing)})
        else:
            x = jnp.broadcast_to(x, (*batch_shape, *trailing))
            own = own._replace(**{name: x.reshape(-1, *trailing)})
    if extras.dropout_key is not None:
        if choices.share_dropout:
            shared = shared._replace(dropout_key=extras.dropout_key)
        else:
            keys = jax.random.split(extras.dropout_key, math.prod(batch_shape))
            own = own._replace(dropout_key=keys)
    return shared, own


def _attend_row(
    query: Array,
    key: Array,
    value: Array,
    extras: Extras,
    choices: Choices,
    block: int | None,
    tiling: Tiling,
) -> Array:
    """Attends in one row: query ``[T, K, G, D]``, output ``[T, K, G, V]``.

    Without a `block` size all queries are one block.
    """
    first_query = extras.first_query
    length, key_length = query.shape[0], key.shape[0]
    # Heads in front: products and their gradients run several times faster than across heads.
    query = jnp.transpose(query, (1, 2, 0, 3))
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
    if block is None:
        position = 0 if first_query is None else first_query
        whole = functools.partial(_attend_block, queries=length, keys=key_length, choices=choices)
        out = jax.checkpoint(whole)(query, key, value, extras, 0, position)
        return jnp.transpose(out, (2, 0, 1, 3))
    aligned = choices.causal and first_query is None
    stages = max(1, min(tiling.stages, length // tiling.smallest)) if aligned else 1
    size = max(1, math.ceil(length / stages))
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = stop if aligned else key_length

        def attend(start: int | Array, queries: int, keys: int = keys) -> Array:
            part = functools.partial(_attend_block, queries=queries, keys=keys, choices=choices)
            position = start if first_query is None else first_query + start
            return jax.checkpoint(part)(query, key, value, extras, start, position)

        blocks = (stop - start) // block
        if blocks > 1:
            starts = start + block * jnp.arange(blocks, dtype=jnp.int32)
            out = lax.map(functools.partial(attend, queries=block), starts)
            parts.append(jnp.moveaxis(out, 0, 2).reshape(*out.shape[1:3], -1, out.shape[-1]))
            start += blocks * block
        if start < stop:
            parts.append(attend(start, stop - start))
    return jnp.transpose(jnp.concatenate(parts, axis=2), (2, 0, 1, 3))


def _attend_block(
    query: Array,
    key: Array,
    value: Array,
    extras: Extras,
    start: int | Array,
    position: int | Array,
    *,
    queries: int,
    keys: int,
    choices: Choices,
) -> Array:
    """Attends from the queries at ``start ..``, which stand at `position`, to the first keys.

    Query ``[K, G, T, D]``, key ``[K, S, D]``, value ``[K, S, V]``, output ``[K, G, C, V]``.
    """
    kv_heads, group, _, width = query.shape

    def of_queries(x: Array, axis: int = 0) -> Array:
        return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, queries, axis)

    def of_scores(x: Array) -> Array:
        x = of_queries(x, -2)[..., :keys]
        split = (1, 1) if len(x) == 1 else (kv_heads, group)
        return x.reshape(*split, *x.shape[1:])

    compute = at_least_float32(query.dtype)
    product = functools.partial(
        jnp.einsum, precision=choices.precision, preferred_element_type=compute
    )
    folded = of_queries(query, 2).reshape(kv_heads, group * queries, width)
    scores = product("ktd,ksd->kts", folded, key[:, :keys])
    scores = scores * (width**-0.5 if choices.scale is None else choices.scale)
    scores = scores.reshape(kv_heads, group, queries, keys)
    if extras.bias is not None:
        scores = scores + of_scores(extras.bias.astype(compute))
    # Bounds on an iota cost nothing, where comparing segments costs as much as the products.
    own = (position + jnp.arange(queries, dtype=jnp.int32))[:, None]
    key_position = jnp.arange(keys, dtype=jnp.int32)[None]
    if choices.shared:
        scores = jnp.where((own == key_position)[None, None], SELF_LOGIT, scores)
    conditions = []
    if extras.mask is not None:
        conditions.append(of_scores(extras.mask.astype(bool)))
    if extras.key_mask is not None:
        conditions.append(extras.key_mask[None, None, None, :keys].astype(bool))
    if extras.first_key is not None:
        conditions.append((of_queries(extras.first_key)[:, None] <= key_position)[None, None])
    if extras.last_key is not None:
        conditions.append((of_queries(extras.last_key)[:, None] >= key_position)[None, None])
    if choices.causal:
        conditions.append((own >= key_position)[None, None])
    if conditions:
        scores = jnp.where(functools.reduce(jnp.logical_and, conditions), scores, -jnp.inf)
    largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(largest == -jnp.inf, 0, largest))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if extras.dropout_key is not None:
        shape = weights.shape[-2:] if choices.share_dropout else weights.shape
        dropout_key = jax.random.fold_in(extras.dropout_key, start)
        kept = jax.random.bernoulli(dropout_key, 1 - choices.dropout_rate, shape)
        kept = kept.reshape((1,) * (weights.ndim - kept.ndim) + kept.shape)
        weights = jnp.where(kept, weights / max(1 - choices.dropout_rate, 1e-6), 0)
    weights = weights.astype(value.dtype).reshape(kv_heads, group * queries, keys)
    out = product("kts,ksv->ktv", weights, value[:, :keys])
    out = out.reshape(kv_heads, group, queries, -1) / jnp.where(total == 0, 1, total)
    return out.astype(value.dtype)
