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

# Query and key features are each kept this many nats above their maxima inside a chunk, so that
# their product uses float32's range on both sides of 1: pairs whose features hardly overlap (opposed
# queries and keys of squared norm 200) still have a product that does not underflow.
HEADROOM = 25.0

LARGEST_EXPONENT = 87.0


class Sight(NamedTuple):
    """Who sees whom in a chunk; None means everybody.

    Attributes:
      pairs: bool, broadcastable to ``[B, K, R, C]``: row may read key. The first key of the chunk
        is excluded, it is read through the state.
      state: bool ``[B, 1, R]``: row may read the state and the first key.
      carry: bool ``[B]``: the state before the chunk is still read in it (no new segment).
      keep: bool ``[B]``: the state before the chunk outlives it.
      enter: bool ``[B, 1, C]``: key enters the state after the chunk.
    """

    pairs: Array
    state: Array | None = None
    carry: Array | None = None
    keep: Array | None = None
    enter: Array | None = None


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
    """

    features: Array
    shift: Array | None
    row_max: Array | None


def absorb_keys(state: LinearAttentionState, keys: Features, sight: Sight | None) -> Absorbed:
    """Brings key features to the scale the state has after these keys."""
    enter = None if sight is None else sight.enter
    if keys.log is None:
        assert keys.values is not None
        features, decay = keys.values, None
        if enter is not None:
            features = jnp.where(enter[..., None], features, 0)
        if sight is not None and sight.keep is not None:
            decay = sight.keep[:, None, None].astype(features.dtype)
        return Absorbed(Features(features, None), features, None, decay, None)
    assert state.log_scale is not None
    before, log = state.log_scale, keys.log
    if sight is not None and sight.keep is not None:
        before = jnp.where(sight.keep[:, None, None], before, EMPTY_LOG_SCALE)
    if enter is not None:
        log = jnp.where(enter[..., None], log, -jnp.inf)
    log_scale = jnp.maximum(before, log.max(axis=-2))
    shift = -log_scale[..., None, :]
    decay = jnp.exp(before - log_scale)
    if sight is not None and sight.keep is not None:
        # An empty scale on both sides would give exp(0).
        decay = jnp.where(sight.keep[:, None, None], decay, 0)
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
        return Read(queries.shift(None), None, None)
    assert log_scale is not None
    scale = log_scale[..., None, :]
    row_max = (queries.log + scale).max(axis=-1)
    shift = scale - row_max[..., None]
    return Read(queries.shift(shift), shift, row_max)


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
      query, key: features inside the chunk, ``[B, K, R, M]`` and ``[B, K, C, M]``.
      query_shift, key_shift: what was added to their logarithms, or None.
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
    query: Array
    key: Array
    query_shift: Array | None
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
    recurrence.
    """
    first, old, first_key = _with_first_key(state, keys, value, sight)
    read = read_state(first.log_scale, queries)
    inter = jnp.einsum("bkrm,bkvm->bkrv", read.features, first.kv, precision=precision)
    inter_sum = (read.features * first.k_sum[..., None, :]).sum(-1)
    if queries.log is None or keys.log is None:
        query, key = queries.shift(None), keys.shift(None)
        query_shift = key_shift = log_scale = None
        products = jnp.einsum("bkrm,bkcm->bkrc", query, key, precision=precision)
        factor = jnp.broadcast_to(sight.pairs, products.shape).astype(products.dtype)
        gain = None if sight.state is None else sight.state.astype(products.dtype)
    else:
        headroom = HEADROOM if queries.values is None else 0.0
        query_max, key_max = queries.log.max(-1), keys.log.max(-1)
        query_shift, key_shift = headroom - query_max[..., None], headroom - key_max[..., None]
        query, key = queries.shift(query_shift), keys.shift(key_shift)
        products = jnp.einsum("bkrm,bkcm->bkrc", query, key, precision=precision)
        exponent = query_max[..., :, None] + key_max[..., None, :] - 2 * headroom
        logs = jnp.where(sight.pairs, jnp.log(jnp.abs(products)) + exponent, -jnp.inf)
        assert read.row_max is not None
        past = read.row_max
        if sight.state is not None:
            past = jnp.where(sight.state, past, EMPTY_LOG_SCALE)
        log_scale = jnp.maximum(past, logs.max(-1))
        factor = jnp.exp(jnp.minimum(exponent - log_scale[..., None], LARGEST_EXPONENT))
        factor = jnp.where(sight.pairs, factor, 0)
        gain = jnp.exp(past - log_scale)
        if sight.state is not None:
            gain = jnp.where(sight.state, gain, 0)
    weights = products * factor
    if gain is not None:
        inter, inter_sum = inter * gain[..., None], inter_sum * gain
    return CausalRead(
        numerator=inter + jnp.einsum("bkrc,bkcv->bkrv", weights, value, precision=precision),
        denominator=inter_sum + weights.sum(-1),
        log_scale=log_scale,
        first=first,
        old=old,
        first_key=first_key,
        read=read,
        gain=gain,
        query=query,
        key=key,
        query_shift=query_shift,
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


class ChunkGradients(NamedTuple):
    """Cotangents of one causal chunk: features, values and the state before it."""

    queries: Features
    keys: Features
    value: Array
    kv: Array
    k_sum: Array


def pull_back_causal(
    queries: Features,
    keys: Features,
    value: Array,
    read: CausalRead,
    absorbed: Absorbed,
    d_numerator: Array,
    d_denominator: Array,
    d_kv: Array,
    d_k_sum: Array,
    enter: Array | None,
    precision: jax.lax.PrecisionLike,
) -> ChunkGradients:
    """Pulls cotangents of a chunk's output and of the state after it back to its inputs.

    Args:
      queries: features given to :func:`read_causal`.
      keys: features given to it.
      value: values given to it.
      read: what it returned.
      absorbed: what :func:`absorb_keys` returned for the same chunk.
      d_numerator: cotangent of ``read.numerator``.
      d_denominator: cotangent of ``read.denominator``.
      d_kv: cotangent of ``kv`` after the chunk.
      d_k_sum: cotangent of ``k_sum`` after the chunk.
      enter: which keys entered the state, as in :class:`Sight`.
      precision: of the matrix products.

    Returns:
      Cotangents of the inputs and of the state before the chunk.
    """

    def einsum(subscripts: str, *operands: Array) -> Array:
        return jnp.einsum(subscripts, *operands, precision=precision)

    # Inside the chunk.
    d_weights = einsum("bkrv,bkcv->bkrc", d_numerator, value) + d_denominator[..., None]
    d_products = d_weights * read.factor
    d_query = einsum("bkrc,bkcm->bkrm", d_products, read.key)
    d_key = einsum("bkrc,bkrm->bkcm", d_products, read.query)
    d_value = einsum("bkrc,bkrv->bkcv", read.weights, d_numerator)

    # What rows read from the state and the first key.
    if read.gain is not None:
        d_numerator = d_numerator * read.gain[..., None]
        d_denominator = d_denominator * read.gain
    first = read.first
    d_read = einsum("bkrv,bkvm->bkrm", d_numerator, first.kv)
    d_read = d_read + d_denominator[..., None] * first.k_sum[..., None, :]
    d_first_kv = einsum("bkrv,bkrm->bkvm", d_numerator, read.read.features)
    d_first_sum = (d_denominator[..., None] * read.read.features).sum(-2)
    d_first_key = (value[..., 0, :, None] * d_first_kv).sum(-2) + d_first_sum
    d_first_value = (d_first_kv * read.first_key[..., None, :]).sum(-1)

    # What entered the state.
    d_entered, d_entered_value = pull_back_absorbed(
        absorbed, value, d_kv, d_k_sum, precision, enter
    )

    before_kv, before_sum = d_first_kv, d_first_sum
    if read.old is not None:
        before_kv, before_sum = before_kv * read.old[..., None, :], before_sum * read.old
    if absorbed.decay is not None:
        d_kv, d_k_sum = d_kv * absorbed.decay[..., None, :], d_k_sum * absorbed.decay

    first_shift = None if first.log_scale is None else -first.log_scale[..., None, :]
    return ChunkGradients(
        queries=_add(
            queries.pull_back(read.query_shift, read.query, d_query),
            queries.pull_back(read.read.shift, read.read.features, d_read),
        ),
        keys=_add_first(
            _add(
                keys.pull_back(read.key_shift, read.key, d_key),
                d_entered,
            ),
            _first(keys).pull_back(
                first_shift, read.first_key[..., None, :], d_first_key[..., None, :]
            ),
        ),
        value=(d_value + d_entered_value).at[..., 0, :].add(d_first_value),
        kv=before_kv + d_kv,
        k_sum=before_sum + d_k_sum,
    )


def pull_back_absorbed(
    absorbed: Absorbed,
    value: Array,
    d_kv: Array,
    d_k_sum: Array,
    precision: jax.lax.PrecisionLike,
    enter: Array | None = None,
) -> tuple[Features, Array]:
    """Returns cotangents of absorbed key features and of values, given those of the state."""
    d_features = jnp.einsum("bkcv,bkvm->bkcm", value, d_kv, precision=precision)
    d_value = jnp.einsum("bkcm,bkvm->bkcv", absorbed.features, d_kv, precision=precision)
    d_features = d_features + d_k_sum[..., None, :]
    if enter is not None:
        d_features = jnp.where(enter[..., None], d_features, 0)
    return absorbed.source.pull_back(absorbed.shift, absorbed.features, d_features), d_value


def _add(left: Features, right: Features) -> Features:
    return jax.tree.map(jnp.add, left, right)


def _first(features: Features) -> Features:
    return jax.tree.map(lambda x: x[..., :1, :], features)


def _add_first(features: Features, first: Features) -> Features:
    return jax.tree.map(lambda x, y: x.at[..., :1, :].add(y), features, first)
