"""The backward pass of one chunk; see :mod:`.chunk_state` for layout and letters."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear.chunked.causal_chunk import (
    CausalRead,
    Past,
    first_key_features,
)
from fast_attention.linear.chunked.chunk_state import Absorbed
from fast_attention.linear.chunked.wide_pairs import pull_back_wide_pairs
from fast_attention.linear.rounded_products import Einsum, sums


class ChunkGradients(NamedTuple):
    """Cotangents of one causal chunk: features, values and the state before it; and all weights."""

    queries: Features
    keys: Features
    value: Array
    kv: Array
    k_sum: Array
    weights: Array


class RowCotangents(NamedTuple):
    """Cotangents of what the rows of a chunk computed.

    Attributes:
      weights: ``[B, K, R, C]``, of ``CausalRead.weights``, from numerator and denominator.
      numerator: ``[B, K, R, V]``.
      denominator: ``[B, K, R]``.
    """

    weights: Array
    numerator: Array
    denominator: Array


def pull_back_causal(
    queries: Features,
    keys: Features,
    value: Array,
    past: Past,
    read: CausalRead,
    absorbed: Absorbed,
    d_rows: RowCotangents,
    d_kv: Array,
    d_k_sum: Array,
    enter: Array | None,
    einsum: Einsum,
) -> ChunkGradients:
    """Pulls cotangents of a chunk's output and of the state after it back to its inputs.

    With ``f_t`` the features of query t, ``g_s`` those of key s, and the state ``(S, z)`` that the
    rows read, all divided by the exponentials of their scales (constants for differentiation), the
    forward pass of a chunk is::

        w_ts  = f_t . g_s                                  pairs s <= t inside the chunk
        num_t = S f_t + sum_s w_ts v_s,   den_t = z . f_t + sum_s w_ts
        S'    = decay * S + sum_s v_s g_s,   z' = decay * z + sum_s g_s

    Hence, with d for the cotangent of a number and ``dw_ts = dnum_t . v_s + dden_t`` given::

        df_t = S^T dnum_t + dden_t z + sum_s dw_ts g_s
        dg_s = sum_t dw_ts f_t + dS'^T v_s + dz'
        dv_s = sum_t w_ts dnum_t + dS' g_s                 (the first term is the caller's)
        dS   = decay * dS' + sum_t dnum_t f_t,   dz = decay * dz' + sum_t dden_t f_t

    The first key of the chunk is in the state that the rows read (:func:`add_first_key`), so that
    its ``dg`` and ``dv`` come from ``dS`` and ``dz`` in place of the sums over pairs.

    Args:
      queries: features given to :func:`read_causal`.
      keys: features given to it.
      value: values given to it.
      past: the state read.
      read: what :func:`read_causal` returned.
      absorbed: what :func:`absorb_keys` returned for the keys after the first.
      d_rows: cotangents of what the rows computed.
      d_kv: cotangent of ``kv`` after the chunk.
      d_k_sum: cotangent of ``k_sum`` after the chunk.
      enter: which keys entered the state, as in :class:`Sight`.
      einsum: the matrix products.

    Returns:
      Cotangents of the inputs and of the state before the chunk; that of values is without what
      comes through the weights inside the chunk, which are returned.
    """
    d_first_kv, d_first_sum = pull_back_state(read, d_rows, einsum)
    entered = pull_back_absorbed(absorbed, value, d_kv, d_k_sum, einsum, enter)
    if absorbed.decay is not None:
        d_kv, d_k_sum = d_kv * absorbed.decay[..., None, :], d_k_sum * absorbed.decay
    return pull_back_read(
        queries,
        keys,
        value,
        past,
        read,
        d_rows,
        (d_kv + d_first_kv, d_k_sum + d_first_sum),
        entered,
        einsum,
    )


def pull_back_state(read: CausalRead, d_rows: RowCotangents, einsum: Einsum) -> tuple[Array, Array]:
    """Returns the cotangents of ``kv`` and ``k_sum`` with the first key, from rows that read it."""
    d_numerator, d_denominator = _gained(read, d_rows)
    d_kv = einsum("bkrv,bkrm->bkvm", d_numerator, read.read.features)
    return d_kv, sums("bkr,bkrm->bkm", d_denominator, read.read.features)


def pull_back_read(
    queries: Features,
    keys: Features,
    value: Array,
    past: Past,
    read: CausalRead,
    d_rows: RowCotangents,
    d_first: tuple[Array, Array],
    entered: tuple[Features, Array],
    einsum: Einsum,
) -> ChunkGradients:
    """Pulls cotangents back as :func:`pull_back_causal`, those of the states given.

    Args:
      queries: as there, and so are those without a word here.
      keys: the same.
      value: the same.
      past: the same.
      read: the same.
      d_rows: the same.
      d_first: cotangents of ``kv`` and ``k_sum`` with the first key.
      entered: cotangents of keys and values through the state after the chunk.
      einsum: the matrix products.
    """
    d_weights = d_rows.weights
    # Inside the chunk.
    d_products = d_weights * read.factor
    d_read = einsum("bkrc,bkcm->bkrm", d_products, read.key)
    d_key = einsum("bkrc,bkrm->bkcm", d_products, read.read.features)

    # What rows read from the state and the first key.
    d_numerator, d_denominator = _gained(read, d_rows)
    first, old = past.first, past.old
    first_key = first_key_features(first, keys)
    # Numerator and denominator nearly cancel here: rounding one of them would show.
    d_read = d_read + einsum("bkrv,bkvm->bkrm", d_numerator, first.kv, rounded=False)
    d_read = d_read + d_denominator[..., None] * first.k_sum[..., None, :]

    # The state with the first key: read by rows, and kept.
    d_first_kv, d_first_sum = d_first
    d_first_key = sums("bkv,bkvm->bkm", value[..., 0, :], d_first_kv) + d_first_sum
    d_first_value = sums("bkvm,bkm->bkv", d_first_kv, first_key)
    if old is not None:
        d_first_kv, d_first_sum = (
            d_first_kv * old[..., None, :],
            d_first_sum * old,
        )

    d_entered, d_entered_value = entered
    d_queries = queries.pull_back(read.read.shift, read.read.features, d_read)
    first_shift = None if first.log_scale is None else -first.log_scale[..., None, :]
    d_keys = _add_first(
        _add(
            keys.pull_back(read.key_shift, read.key, d_key),
            d_entered,
        ),
        _first(keys).pull_back(first_shift, first_key[..., None, :], d_first_key[..., None, :]),
    )
    weights = read.weights
    if read.wide is not None:
        assert read.kept.pair_max is not None
        assert d_queries.log is not None and d_keys.log is not None
        weights, *logs = pull_back_wide_pairs(
            read.wide, read.kept.pair_max, d_weights, weights, d_queries.log, d_keys.log
        )
        d_queries, d_keys = (Features(None, log) for log in logs)
    return ChunkGradients(
        queries=d_queries,
        keys=d_keys,
        value=d_entered_value + _in_first_row(d_first_value[..., None, :], value.shape[-2]),
        kv=d_first_kv,
        k_sum=d_first_sum,
        weights=weights,
    )


def pull_back_absorbed(
    absorbed: Absorbed,
    value: Array,
    d_kv: Array,
    d_k_sum: Array,
    einsum: Einsum,
    enter: Array | None = None,
) -> tuple[Features, Array]:
    """Returns cotangents of absorbed key features and of values, given those of the state."""
    d_features = einsum("bkcv,bkvm->bkcm", value, d_kv)
    d_value = einsum("bkcm,bkvm->bkcv", absorbed.features, d_kv)
    d_features = d_features + d_k_sum[..., None, :]
    if enter is not None:
        d_features = jnp.where(enter[..., None], d_features, 0)
    if absorbed.gain is not None:
        d_features = d_features * absorbed.gain[..., None]
    return absorbed.source.pull_back(absorbed.shift, absorbed.features, d_features), d_value


def _gained(read: CausalRead, d_rows: RowCotangents) -> tuple[Array, Array]:
    """Returns the cotangents of what rows read from the state, on its own scale."""
    if read.gain is None:
        return d_rows.numerator, d_rows.denominator
    return d_rows.numerator * read.gain[..., None], d_rows.denominator * read.gain


def _add(left: Features, right: Features) -> Features:
    return jax.tree.map(jnp.add, left, right)


def _first(features: Features) -> Features:
    return jax.tree.map(lambda x: x[..., :1, :], features)


def _add_first(features: Features, first: Features) -> Features:
    return jax.tree.map(lambda x, y: x + _in_first_row(y, x.shape[-2]), features, first)


def _in_first_row(x: Array, rows: int) -> Array:
    """Pads ``[..., 1, N]`` with zero rows; unlike an indexed update it fuses with what follows."""
    is_first = jnp.arange(rows) == 0
    return jnp.where(is_first[:, None].reshape((1,) * (x.ndim - 2) + (rows, 1)), x, 0)
