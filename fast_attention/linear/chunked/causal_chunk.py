"""One causal chunk of linear attention: what was seen before it, and who sees whom inside.

Layout and letters are those of :mod:`.chunk_state`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear.chunked.chunk_decay import ChunkDecay
from fast_attention.linear.chunked.chunk_state import Read, read_state
from fast_attention.linear.chunked.wide_pairs import (
    HEADROOM,
    Exponents,
    WidePairs,
    add_wide_pairs,
    pair_limit,
)
from fast_attention.linear.rounded_products import Einsum, sums
from fast_attention.linear.state import EMPTY_LOG_SCALE, LinearAttentionState

# Of maps with one exponent a position, whose products cannot underflow.
LARGEST_EXPONENT = 80.0


class Sight(NamedTuple):
    """Who sees whom in a chunk; None means everybody.

    Attributes:
      pairs: bool, broadcastable to ``[B, K, R, C]``: row may read key. The first key of the chunk
        is excluded, it is read through the state.
      state: bool ``[B, 1, R]``: row may read the state and the first key.
      carry: bool, broadcastable to ``[B, K]``: the state before the chunk is still read in it (no
        new segment).
      keep: bool, broadcastable to ``[B, K]``: the state with the first key outlives the chunk.
      enter: bool, broadcastable to ``[B, K, C]``: key is added to the state after the first one.
      occupied: no key is masked, so that the state with the first key is never empty.
    """

    pairs: Array
    enter: Array
    state: Array | None = None
    carry: Array | None = None
    keep: Array | None = None
    occupied: bool = False


class Past(NamedTuple):
    """The state that the rows of a causal chunk read, and its scales.

    Attributes:
      first: the state with the chunk's first key added.
      old: factor on the state before, ``[B, K, N]``, or None for 1.
      log_scale: scale of the state after the chunk, ``[B, K, N]``, or None.
    """

    first: LinearAttentionState
    old: Array | None
    log_scale: Array | None


class Kept(NamedTuple):
    """What the backward pass keeps of the rows and keys of a causal chunk.

    Attributes:
      row_max: as in :class:`Read`.
      key_max: largest feature of each key on the scale of ``first``, ``[B, K, C]``, or None.
      pair_max: largest weight of each row in units of ``row_max``, ``[B, K, R]``, or None.
      denominator: ``[B, K, R]``.
    """

    row_max: Array | None
    key_max: Array | None
    pair_max: Array | None
    denominator: Array


class CausalRead(NamedTuple):
    """A causal chunk, up to its division.

    With ``w`` the weights inside the chunk and ``g`` the factor on what is read from the state:
    ``num = g (features . kv) + w value`` and ``den = g (features . k_sum) + sum w``, both in units
    of ``exp(log_scale)``. The product with values is left to the caller.

    Attributes:
      past: ``g (features . kv)``, ``[B, K, R, V]``.
      log_scale: ``[B, K, R]`` or None.
      kept: the denominator, and maxima.
      read: queries on the scale of that state.
      gain: g, ``[B, K, R]``, or None for 1.
      key: features of keys inside the chunk, ``[B, K, C, M]``.
      key_shift: what was added to their logarithms, or None.
      factor: weights over products of features, ``[B, K, R, C]``; 0 where a key is not seen.
      weights: w, ``[B, K, R, C]``; without wide pairs if maxima were kept.
      wide: the pairs as exponents, for maps of exponents alone; None for others.
    """

    past: Array
    log_scale: Array | None
    kept: Kept
    read: Read
    gain: Array | None
    key: Array
    key_shift: Array | None
    factor: Array
    weights: Array
    wide: WidePairs | None


def read_causal(
    first: LinearAttentionState,
    queries: Features,
    keys: Features,
    sight: Sight,
    einsum: Einsum,
    exponents: Exponents,
    kept: Kept | None = None,
    at_least: Array | None = None,
    decay: ChunkDecay | None = None,
) -> CausalRead:
    """Reads a chunk causally: the state and the first key together, later keys pair by pair.

    Every row sees the first key (or has no past at all), so a row's largest term over state and
    first key is exactly 1 and no denominator can vanish. With one key a chunk this is the
    recurrence. Later keys are scaled per feature by the same state, and by their own largest
    feature on that scale, which goes into the weights; each row's weights are then brought below 1
    by the largest pair the row itself sees.

    Args:
      first: the state with the chunk's first key, as from :func:`add_first_key`.
      queries: features.
      keys: features.
      sight: who sees whom.
      einsum: the matrix products.
      exponents: makes those of the queries and keys anew, where they are needed.
      kept: of an earlier call; maxima are not looked for again.
      at_least: ``[B, K, R]``, the least that ``log_scale`` may be, for rows that also see keys
        which are not here; None for none. Maps with exponents only.
      decay: of the chunk, or None.
    """
    largest = None if kept is None else kept.row_max
    read = read_state(first.log_scale, queries, largest, sight.occupied)
    past = einsum("bkrm,bkvm->bkrv", read.features, first.kv)
    # Row sums are written as products: XLA on CPU fuses a plain sum with the exponentials before it
    # and evaluates them a second time, element by element.
    past_sum = sums("bkrm,bkm->bkr", read.features, first.k_sum)
    if read.scale is None or first.log_scale is None or keys.log is None:
        pairs = _pairs_of_values(read, keys, sight, einsum, decay)
    else:
        pairs = _pairs_of_exponents(
            first.log_scale, read, keys, sight, einsum, exponents, kept, at_least, decay
        )
    if pairs.gain is not None:
        past, past_sum = past * pairs.gain[..., None], past_sum * pairs.gain
    if kept is None:
        denominator = past_sum + row_sums(pairs.weights)
        kept = Kept(read.row_max, pairs.key_max, pairs.pair_max, denominator)
    return CausalRead(
        past=past,
        log_scale=pairs.log_scale,
        kept=kept,
        read=read,
        gain=pairs.gain,
        key=pairs.key,
        key_shift=pairs.key_shift,
        factor=pairs.factor,
        weights=pairs.weights,
        wide=pairs.wide,
    )


class _Pairs(NamedTuple):
    """Rows and keys inside a chunk; see :class:`CausalRead` and :class:`Kept`."""

    key: Array
    factor: Array
    weights: Array
    gain: Array | None
    key_shift: Array | None = None
    key_max: Array | None = None
    pair_max: Array | None = None
    log_scale: Array | None = None
    wide: WidePairs | None = None


def _pairs_of_values(
    read: Read, keys: Features, sight: Sight, einsum: Einsum, decay: ChunkDecay | None
) -> _Pairs:
    """Weights of pairs for maps without exponents: nothing is scaled."""
    key = keys.shift(None)
    products = einsum("bkrm,bkcm->bkrc", read.features, key)
    factor = jnp.broadcast_to(sight.pairs, products.shape).astype(products.dtype)
    gain = None if sight.state is None else sight.state.astype(products.dtype)
    if decay is not None:
        factor = factor * jnp.exp(decay.pairs)
        gain = jnp.exp(decay.rows) if gain is None else gain * jnp.exp(decay.rows)
    return _Pairs(key, factor, products * factor, gain)


def _pairs_of_exponents(
    scale: Array,
    read: Read,
    keys: Features,
    sight: Sight,
    einsum: Einsum,
    exponents: Exponents,
    kept: Kept | None,
    at_least: Array | None,
    decay: ChunkDecay | None,
) -> _Pairs:
    """Weights of pairs for maps with exponents, scaled; the arguments are :func:`read_causal`'s.

    With ``u_c`` the largest logarithm of a feature of key c on the scale of the state
    (``key_max``), the key is multiplied by ``exp(HEADROOM - u_c)``, and its product with a row by
    ``exp(u_c - HEADROOM - p)``, where ``p`` (``pair_max``) is the largest logarithm of all that the
    row reads, its past included.
    """
    assert read.scale is not None and read.row_max is not None and keys.log is not None
    headroom = HEADROOM if keys.values is None else 0.0
    key_max = (keys.log - read.scale).max(-1) if kept is None else kept.key_max
    assert key_max is not None
    key_max = lax.stop_gradient(key_max)
    key_shift = headroom - read.scale - key_max[..., None]
    key = keys.shift(key_shift)
    products = einsum("bkrm,bkcm->bkrc", read.features, key)
    exponent = key_max - headroom
    wide = None
    if keys.values is None:
        pairs = None if decay is None else decay.pairs
        wide = WidePairs(exponents, read.scale, read.row_max, key_max, sight.pairs, pairs)
    past = _past_exponent(scale, key_max, sight, decay)
    least = past if at_least is None else jnp.maximum(past, at_least - read.row_max)
    if kept is None:
        smallest = 0 if wide is None else jnp.finfo(products.dtype).tiny
        logs = jnp.log(jnp.maximum(jnp.abs(products), smallest)) + exponent[..., None, :]
        if decay is not None:
            logs = logs + decay.pairs
        pair_max = jnp.maximum(least, jnp.where(sight.pairs, logs, -jnp.inf).max(-1))
    else:
        pair_max = kept.pair_max
    assert pair_max is not None
    pair_max = lax.stop_gradient(pair_max)
    logs = exponent[..., None, :] - pair_max[..., None]
    if decay is not None:
        logs = logs + decay.pairs
    if wide is None:
        factor = jnp.exp(jnp.minimum(logs, LARGEST_EXPONENT))
        factor = jnp.where(sight.pairs & (products != 0), factor, 0)
    else:
        few = sight.pairs & (logs <= pair_limit(logs.dtype) - HEADROOM)
        # Before the exponential: the derivative of one that overflows is not finite.
        factor = jnp.exp(jnp.where(few, logs, -jnp.inf))
    weights = products * factor
    if wide is not None and kept is None:
        weights, pair_max = add_wide_pairs(wide, products, weights, pair_max, least)
        pair_max = lax.stop_gradient(pair_max)
    gain = jnp.exp(past - pair_max)
    if sight.state is not None:
        gain = jnp.where(sight.state, gain, 0)
    log_scale = read.row_max + pair_max
    return _Pairs(key, factor, weights, gain, key_shift, key_max, pair_max, log_scale, wide)


def _past_exponent(scale: Array, key_max: Array, sight: Sight, decay: ChunkDecay | None) -> Array:
    """Returns a bound of what rows read from the state, as a logarithm: about 0, or empty."""
    past = jnp.zeros_like(key_max[..., :1]) if decay is None else decay.rows
    if not sight.occupied:
        empty = jnp.all(scale <= 0.5 * EMPTY_LOG_SCALE, axis=-1, keepdims=True)
        past = jnp.where(empty, EMPTY_LOG_SCALE, past)
    if sight.state is not None:
        past = jnp.where(sight.state, past, EMPTY_LOG_SCALE)
    return past


def first_key_features(first: LinearAttentionState, keys: Features) -> Array:
    """Returns a chunk's first key on the scale of ``first``, ``[B, K, M]``."""
    values = None if keys.values is None else keys.values[..., :1, :]
    if keys.log is None:
        return Features(values, None).shift(None)[..., 0, :]
    assert first.log_scale is not None
    log = keys.log[..., :1, :]
    return Features(values, log).shift(-first.log_scale[..., None, :])[..., 0, :]


def add_first_key(
    state: LinearAttentionState,
    keys: Features,
    value: Array,
    sight: Sight,
    decay: ChunkDecay | None = None,
) -> tuple[LinearAttentionState, Array | None]:
    """Returns the state with the chunk's first key, and the factor on the one before."""
    carry = None if sight.carry is None else sight.carry[..., None]
    if keys.log is None:
        old = None if carry is None else carry.astype(state.kv.dtype)
        if decay is not None:
            faded = jnp.exp(decay.first)[..., None]
            old = faded if old is None else old * faded
        scale = None
    else:
        assert state.log_scale is not None
        # Scales cancel: constants for derivatives of any order, here as wherever they are read.
        before = lax.stop_gradient(state.log_scale)
        if decay is not None:
            before = before + decay.first[..., None]
        if carry is not None:
            before = jnp.where(carry, before, EMPTY_LOG_SCALE)
        if decay is None:
            scale = jnp.maximum(before, keys.log[..., 0, :])
        else:
            # The same as a reduction: XLA on CPU would compute a decayed scale, which takes more
            # operations, for each row anew.
            log, before = keys.log[..., :8, :], before[..., None, :]
            is_first = (jnp.arange(log.shape[-2]) == 0)[:, None]
            scale = jnp.maximum(before, jnp.where(is_first, log, before)).max(axis=-2)
            before = before[..., 0, :]
        scale = lax.stop_gradient(scale)
        old = jnp.exp(before - scale)
        if carry is not None:
            old = jnp.where(carry, old, 0)
    kv, k_sum = state.kv, state.k_sum
    if old is not None:
        kv, k_sum = kv * old[..., None, :], k_sum * old
    first_key = first_key_features(LinearAttentionState(kv, k_sum, scale), keys)
    kv = kv + value[..., 0, :, None] * first_key[..., None, :]
    return LinearAttentionState(kv, k_sum + first_key, scale), old


def row_sums(x: Array) -> Array:
    """Sums weights ``[B, K, R, C]`` over keys, as a product."""
    return sums("bkrc,c->bkr", x, jnp.ones(x.shape[-1:], x.dtype))
