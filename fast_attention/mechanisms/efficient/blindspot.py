"""Causal attention to complete earlier buckets: the form of efficient attention with a blind spot.

Positions are cut into buckets of n. A query in bucket b reads the keys of buckets 0..b-1, each key
with the weight ``sum_m exp(q_m + k_m)``, and nothing of its own bucket; the first bucket reads
nothing and gives zeros. Something else, such as local attention, has to look at the near past.

Bucket after bucket is read from, then merged into, one :class:`LinearAttentionState`. For the
backward pass only the states between groups of buckets are kept, about the square root of all, and
those within a group computed again.

Shape letters: B batch, T length, C positions in a bucket, H heads, K key/value heads, V value
width, M channels of queries and keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.ragged import from_grid, places, to_grid
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps import LogFeatures
from fast_attention.linear import LinearAttentionState, empty_state, merge
from fast_attention.linear.state import EMPTY_LOG_SCALE
from fast_attention.linear.types import safe_inverse


class BlindspotState(NamedTuple):
    """What decoding remembers: its size depends neither on the length nor on the bucket.

    Attributes:
      complete: the keys of complete buckets.
      pending: the keys of the bucket that is being filled.
      count: ``[*B]`` int32, how many there are.
    """

    complete: LinearAttentionState
    pending: LinearAttentionState
    count: Int[Array, "*B"]


def empty_blindspot_state(
    batch_shape: tuple[int, ...],
    num_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: Any = None,
) -> BlindspotState:
    """Returns the state before the first token; `dtype` as for a `LinearAttentionState`."""
    empty = empty_state(LogFeatures(), None, batch_shape, num_heads, head_dim, value_dim, dtype)
    return BlindspotState(empty, empty, jnp.zeros(batch_shape, jnp.int32))


def attend_to_buckets(
    query: Float[Array, "*B T H M"],
    key: Float[Array, "*B T K M"],
    value: Float[Array, "*B T K V"],
    bucket_size: int,
    *,
    key_mask: Bool[Array, "*B T #K"] | None = None,
    complete: LinearAttentionState | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "*B T H V"], LinearAttentionState]:
    """Attends from every position to the complete buckets before its own.

    Args:
      query: ``[*B, T, H, M]`` logarithms, float32 or float64 as all three.
      key: ``[*B, T, K, M]`` logarithms.
      value: ``[*B, T, K, V]``.
      bucket_size: positions in a bucket; T need not be a multiple of it.
      key_mask: ``[*B, T, K or 1]``; a key where it is False contributes nothing.
      complete: buckets before the first one.
      precision: of products.

    Returns:
      ``[*B, T, H, V]``, and the state of ``complete`` and all keys given.
    """
    length, batch_shape = query.shape[-3], query.shape[:-3]
    axis = len(batch_shape)
    number = -(-length // bucket_size)
    group = math.isqrt(number - 1) + 1
    groups = -(-number // group)
    padding = groups * group * bucket_size - length
    if padding and key_mask is None:
        key_mask = jnp.ones((*batch_shape, length, 1), bool)

    def grouped(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, padding)
        x = jnp.pad(x, widths)
        x = x.reshape(*batch_shape, groups, group, bucket_size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, (axis, axis + 1), (0, 1))

    if complete is None:
        complete = empty_state(
            LogFeatures(),
            None,
            batch_shape,
            key.shape[-2],
            key.shape[-1],
            value.shape[-1],
            key.dtype,
        )

    def one_bucket(state, bucket):
        query, key, value, key_mask = bucket
        after = merge(state, state_of_keys(key, value, key_mask, precision))
        return after, read_state(state, query, precision)

    @jax.checkpoint
    def one_group(state, buckets):
        return lax.scan(one_bucket, state, buckets)

    arrays = jax.tree.map(grouped, (query, key, value, key_mask))
    state, out = lax.scan(one_group, vary_alike(complete, arrays), arrays)
    out = jnp.moveaxis(out, (0, 1), (axis, axis + 1))
    out = out.reshape(*batch_shape, -1, *out.shape[-2:])
    return lax.slice_in_dim(out, 0, length, axis=axis), state


def prefill_buckets(
    state: BlindspotState,
    query: Float[Array, "*B T H M"],
    key: Float[Array, "*B T K M"],
    value: Float[Array, "*B T K V"],
    bucket_size: int,
    *,
    key_mask: Bool[Array, "*B T"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "*B T H V"], BlindspotState]:
    """Reads T tokens after those in the state; padding takes no place in a bucket.

    Args:
      state: what came before.
      query: ``[*B, T, H, M]`` logarithms.
      key: ``[*B, T, K, M]`` logarithms.
      value: ``[*B, T, K, V]``.
      bucket_size: positions in a bucket.
      key_mask: ``[*B, T]``; False is padding, on either side.
      precision: of products.

    Returns:
      ``[*B, T, H, V]`` (unspecified at padding) and the state after the tokens.
    """
    visible = jnp.ones(query.shape[:-2], bool) if key_mask is None else key_mask
    # Every token gets its place on a grid of buckets, the first of which is partly filled.
    slots = -(-(bucket_size - 1 + query.shape[-3]) // bucket_size) * bucket_size
    place = places(state.count, visible)
    query, key, value = (to_grid(x, place, visible, slots) for x in (query, key, value))
    slot = jnp.arange(slots, dtype=jnp.int32)
    slot = jnp.broadcast_to(slot, (*visible.shape[:-1], slots))
    end = (state.count + visible.sum(-1, dtype=jnp.int32))[..., None]
    filled = (slot >= state.count[..., None]) & (slot < end)
    in_complete = slot < end // bucket_size * bucket_size
    first_is_complete = end[..., 0] >= bucket_size
    empty = _emptied(state.pending)
    # What is pending joins the first bucket: it is read from the second one on.
    seen = merge(state.complete, _where(first_is_complete, state.pending, empty))
    later, complete = attend_to_buckets(
        query,
        key,
        value,
        bucket_size,
        key_mask=(filled & in_complete)[..., None],
        complete=seen,
        precision=precision,
    )
    first = read_state(state.complete, query[..., :bucket_size, :, :], precision)
    out = jnp.concatenate([first, later[..., bucket_size:, :, :]], axis=-3)
    rest = state_of_keys(key, value, (filled & ~in_complete)[..., None], precision)
    pending = merge(_where(first_is_complete, empty, state.pending), rest)
    count = end[..., 0] % bucket_size
    return from_grid(out, place), BlindspotState(complete, pending, count)


def step_buckets(
    state: BlindspotState,
    query: Float[Array, "*B H M"],
    key: Float[Array, "*B K M"],
    value: Float[Array, "*B K V"],
    bucket_size: int,
    *,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "*B H V"], BlindspotState]:
    """Reads one token: time and memory depend neither on the past nor on the bucket."""
    query, key, value = (jnp.expand_dims(x, -3) for x in (query, key, value))
    out = read_state(state.complete, query, precision)
    pending = merge(state.pending, state_of_keys(key, value, precision=precision))
    full = state.count + 1 == bucket_size
    return jnp.squeeze(out, -3), BlindspotState(
        complete=_where(full, merge(state.complete, pending), state.complete),
        pending=_where(full, _emptied(pending), pending),
        count=jnp.where(full, 0, state.count + 1),
    )


def state_of_keys(
    key: Float[Array, "*B C K M"],
    value: Float[Array, "*B C K V"],
    key_mask: Bool[Array, "*B C #K"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> LinearAttentionState:
    """Returns the state of C keys given as logarithms."""
    if key_mask is not None:
        key = jnp.where(key_mask[..., None], key, -jnp.inf)
        value = jnp.where(key_mask[..., None], value, 0)
    scale = lax.stop_gradient(jnp.maximum(key.max(axis=-3), EMPTY_LOG_SCALE))
    features = jnp.exp(key - jnp.expand_dims(scale, -3))
    kv = jnp.einsum("...ckv,...ckm->...kvm", value, features, precision=precision)
    return LinearAttentionState(kv, features.sum(axis=-3), scale)


def read_state(
    state: LinearAttentionState,
    query: Float[Array, "*B C H M"],
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*B C H V"]:
    """Returns what C queries, given as logarithms, read from a state; zeros if it is empty."""
    scale = state.log_scale
    assert scale is not None
    query = query.reshape(*query.shape[:-2], scale.shape[-2], -1, query.shape[-1])
    # The scale of an empty state has no meaning.
    scale = jnp.where(scale > 0.5 * EMPTY_LOG_SCALE, scale, 0)
    log = query + jnp.expand_dims(scale, (-4, -2))
    features = jnp.exp(log - lax.stop_gradient(log.max(axis=-1, keepdims=True)))
    numerator = jnp.einsum("...ckgm,...kvm->...ckgv", features, state.kv, precision=precision)
    denominator = jnp.sum(features * jnp.expand_dims(state.k_sum, (-4, -2)), axis=-1)
    out = numerator * safe_inverse(denominator, 0.0)[..., None]
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])


def _emptied(state: LinearAttentionState) -> LinearAttentionState:
    empty = jax.tree.map(jnp.zeros_like, state)
    return empty._replace(log_scale=jnp.full_like(empty.k_sum, EMPTY_LOG_SCALE))


def _where(
    condition: Bool[Array, "*B"], yes: LinearAttentionState, no: LinearAttentionState
) -> LinearAttentionState:
    def choose(yes: Array, no: Array) -> Array:
        chosen = condition.reshape(condition.shape + (1,) * (yes.ndim - condition.ndim))
        return jnp.where(chosen, yes, no)

    return jax.tree.map(choose, yes, no)
