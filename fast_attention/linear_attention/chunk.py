"""One chunk of linear attention: absorb keys into a state, read with queries, and both backward.

Everything here sees small arrays in the layout ``[B, K, positions, width]``; queries of the G heads
that share a key head are stacked along positions (R = G * C rows). Shape letters: B batch, K
key/value heads, R query rows, C keys, V value width, M features, N = M or 1 log-scales.

Stabilisers (maxima) never look past the row they serve, so the future cannot reach the past, not
even by rounding. They cancel in the result and are constants in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear_attention.state import EMPTY_LOG_SCALE, LinearAttentionState

# Keys inside a chunk are kept this many nats above their own maximum, so that their products with
# queries (at most 1) use float32's range on both sides of 1: a pair whose features hardly overlap
# (opposed queries and keys of squared norm 200) still has a product that does not underflow.
HEADROOM = 40.0

LARGEST_EXPONENT = 80.0


class Sight(NamedTuple):
    """Who sees whom in a chunk; None means everybody.

    Attributes:
      pairs: bool, broadcastable to ``[B, K, R, C]``: row may read key. The first key of the chunk
        is excluded, it is read through the state.
      state: bool ``[B, 1, R]``: row may read the state and the first key.
      carry: bool ``[B]``: the state before the chunk is still read in it (no new segment).
      keep: bool ``[B]``: the state with the first key outlives the chunk.
      enter: bool, broadcastable to ``[B, K, C]``: key is added to the state after the first one.
    """

    pairs: Array
    enter: Array
    state: Array | None = None
    carry: Array | None = None
    keep: Array | None = None


class Absorbed(NamedTuple):
    """Keys of a chunk on the scale of the state after it.

    Attributes:
      source: the features given, without the keys that do not enter.
      features: ``[B, K, C, M]``, at most 1 for exponential maps.
      shift: what was added to their logarithms, ``[B, K, 1, N]``, or None.
      decay: factor on the state before the chunk, ``[B, K, N]``, or None for 1.
      log_scale: the new scale.
    """

    source: Features
    features: Array
    shift: Array | None
    decay: Array | None
    log_scale: Array | None


class Read(NamedTuple):
    """Scaled queries, and the state they read, ``[B, K, ...]``.

    Attributes:
      features: queries times the scale of the state, ``[B, K, R, M]``.
      shift: what was added to their logarithms, ``[B, K, R, N]``, or None.
      row_max: largest logarithm in each row before the shift, ``[B, K, R]``, or None.
      scale: of the state, 0 where it is empty, ``[B, K, 1, N]``, or None.
    """

    features: Array
    shift: Array | None
    row_max: Array | None
    scale: Array | None


def absorb_keys(
    state: LinearAttentionState,
    keys: Features,
    enter: Array | None = None,
    keep: Array | None = None,
) -> Absorbed:
    """Brings key features to the scale the state has after these keys.

    Args:
      state: the state before them.
      keys: their features.
      enter: which keys to add, see :class:`Sight`; None for all.
      keep: where the state before survives, ``[B]``; None for everywhere.
    """
    if keys.log is None:
        assert keys.values is not None
        features, decay = keys.values, None
        if enter is not None:
            features = jnp.where(enter[..., None], features, 0)
        if keep is not None:
            decay = keep[:, None, None].astype(features.dtype)
        return Absorbed(Features(features, None), features, None, decay, None)
    assert state.log_scale is not None
    before, log = state.log_scale, keys.log
    if keep is not None:
        before = jnp.where(keep[:, None, None], before, EMPTY_LOG_SCALE)
    if enter is not None:
        log = jnp.where(enter[..., None], log, -jnp.inf)
    log_scale = jnp.maximum(before, log.max(axis=-2))
    shift = -log_scale[..., None, :]
    decay = jnp.exp(before - log_scale)
    if keep is not None:
        # An empty scale on both sides would give exp(0).
        decay = jnp.where(keep[:, None, None], decay, 0)
    source = Features(keys.values, log)
    return Absorbed(source, source.shift(shift), shift, decay, log_scale)


def next_state(
    state: LinearAttentionState, absorbed: Absorbed, value: Array, precision: jax.lax.PrecisionLike
) -> LinearAttentionState:
    """Returns the state after a chunk of keys."""
    kv = jnp.einsum("bkcv,bkcm->bkvm", value, absorbed.features, precision=precision)
    k_sum = absorbed.features.sum(axis=-2)
    if absorbed.decay is None:
        return LinearAttentionState(state.kv + kv, state.k_sum + k_sum, absorbed.log_scale)
    return LinearAttentionState(
        state.kv * absorbed.decay[..., None, :] + kv,
        state.k_sum * absorbed.decay + k_sum,
        absorbed.log_scale,
    )


def read_state(log_scale: Array | None, queries: Features) -> Read:
    """Brings queries to the scale of a state; each row's largest entry becomes 1."""
    if queries.log is None:
        return Read(queries.shift(None), None, None, None)
    assert log_scale is not None
    # Where nothing was seen yet the scale says nothing: 0 leaves logarithms as they are.
    scale = jnp.where(log_scale > 0.5 * EMPTY_LOG_SCALE, log_scale, 0)[..., None, :]
    row_max = (queries.log + scale).max(axis=-1)
    shift = scale - row_max[..., None]
    return Read(queries.shift(shift), shift, row_max, scale)


class CausalRead(NamedTuple):
    """A causal chunk, up to its division.

    With ``w`` the weights inside the chunk and ``g`` the factor on what is read from the state:
    ``num = g (features . kv) + w value`` and ``den = g (features . k_sum) + sum w``, both in units
    of ``exp(log_scale)``.

    Attributes:
      numerator: ``[B, K, R, V]``.
      denominator: ``[B, K, R]``.
      log_scale: ``[B, K, R]`` or None.
      first: the state with the chunk's first key added, which every row reads.
      old: factor on the state before, ``[B, K, N]``, or None for 1.
      first_key: features of the first key on the scale of ``first``, ``[B, K, M]``.
      read: queries on that scale.
      gain: g, ``[B, K, R]``, or None for 1.
      key: features of keys inside the chunk, ``[B, K, C, M]``.
      key_shift: what was added to their logarithms, or None.
      factor: weights over products of features, ``[B, K, R, C]``; 0 where a key is not seen.
      weights: w, ``[B, K, R, C]``.
    """

    numerator: Array
    denominator: Array
    log_scale: Array | None
    first: LinearAttentionState
    old: Array | None
    first_key: Array
    read: Read
    gain: Array | None
    key: Array
    key_shift: Array | None
    factor: Array
    weights: Array


def read_causal(
    state: LinearAttentionState,
    queries: Features,
    keys: Features,
    value: Array,
    sight: Sight,
    precision: jax.lax.PrecisionLike,
) -> CausalRead:
    """Reads a chunk causally: the state and the first key together, later keys pair by pair.

    Every row sees the first key (or has no past at all), so a row's largest term over state and
    first key is exactly 1 and no denominator can vanish. With one key a chunk this is the
    recurrence. Later keys are scaled per feature by the same state, and by their own largest
    feature on that scale, which goes into the weights; each row's weights are then brought below 1
    by the largest pair the row itself sees.
    """
    first, old, first_key = _with_first_key(state, keys, value, sight)
    read = read_state(first.log_scale, queries)
    inter = jnp.einsum("bkrm,bkvm->bkrv", read.features, first.kv, precision=precision)
    # Row sums are written as products: XLA on CPU fuses a plain sum with the exponentials before it
    # and evaluates them a second time, element by element.
    inter_sum = jnp.einsum("bkrm,bkm->bkr", read.features, first.k_sum, precision=precision)
    if read.scale is None or first.log_scale is None or keys.log is None:
        key, key_shift, log_scale = keys.shift(None), None, None
        products = jnp.einsum("bkrm,bkcm->bkrc", read.features, key, precision=precision)
        factor = jnp.broadcast_to(sight.pairs, products.shape).astype(products.dtype)
        gain = None if sight.state is None else sight.state.astype(products.dtype)
    else:
        headroom = HEADROOM if keys.values is None else 0.0
        key_max = (keys.log - read.scale).max(-1)
        key_shift = headroom - read.scale - key_max[..., None]
        key = keys.shift(key_shift)
        products = jnp.einsum("bkrm,bkcm->bkrc", read.features, key, precision=precision)
        exponent = key_max[..., None, :] - headroom
        logs = jnp.where(sight.pairs, jnp.log(jnp.abs(products)) + exponent, -jnp.inf)
        # What rows read from the state is at most about 1, if there is a state to read.
        empty = jnp.all(first.log_scale <= 0.5 * EMPTY_LOG_SCALE, axis=-1, keepdims=True)
        past = jnp.where(empty, EMPTY_LOG_SCALE, jnp.zeros_like(key_max[..., :1]))
        if sight.state is not None:
            past = jnp.where(sight.state, past, EMPTY_LOG_SCALE)
        row_max = jnp.maximum(past, logs.max(-1))
        factor = jnp.exp(jnp.minimum(exponent - row_max[..., None], LARGEST_EXPONENT))
        factor = jnp.where(sight.pairs & (products != 0), factor, 0)
        gain = jnp.exp(past - row_max)
        if sight.state is not None:
            gain = jnp.where(sight.state, gain, 0)
        assert read.row_max is not None
        log_scale = read.row_max + row_max
    weights = products * factor
    if gain is not None:
        inter, inter_sum = inter * gain[..., None], inter_sum * gain
    return CausalRead(
        numerator=inter + jnp.einsum("bkrc,bkcv->bkrv", weights, value, precision=precision),
        denominator=inter_sum + _row_sums(weights, precision),
        log_scale=log_scale,
        first=first,
        old=old,
        first_key=first_key,
        read=read,
        gain=gain,
        key=key,
        key_shift=key_shift,
        factor=factor,
        weights=weights,
    )


def _with_first_key(
    state: LinearAttentionState, keys: Features, value: Array, sight: Sight
) -> tuple[LinearAttentionState, Array | None, Array]:
    """Returns the state with the chunk's first key, the factor on the old one, and that key."""
    values = None if keys.values is None else keys.values[..., :1, :]
    log = None if keys.log is None else keys.log[..., :1, :]
    carry = None if sight.carry is None else sight.carry[:, None, None]
    if log is None:
        first_key = Features(values, None).shift(None)[..., 0, :]
        old = None if carry is None else carry.astype(first_key.dtype)
        scale = None
    else:
        assert state.log_scale is not None
        before = state.log_scale
        if carry is not None:
            before = jnp.where(carry, before, EMPTY_LOG_SCALE)
        scale = jnp.maximum(before, log[..., 0, :])
        old = jnp.exp(before - scale)
        if carry is not None:
            old = jnp.where(carry, old, 0)
        first_key = Features(values, log).shift(-scale[..., None, :])[..., 0, :]
    kv, k_sum = state.kv, state.k_sum
    if old is not None:
        kv, k_sum = kv * old[..., None, :], k_sum * old
    kv = kv + value[..., 0, :, None] * first_key[..., None, :]
    return LinearAttentionState(kv, k_sum + first_key, scale), old, first_key


def _row_sums(x: Array, precision: jax.lax.PrecisionLike) -> Array:
    return jnp.einsum("bkrc,c->bkr", x, jnp.ones(x.shape[-1:], x.dtype), precision=precision)
