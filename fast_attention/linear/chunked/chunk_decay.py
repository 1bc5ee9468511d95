"""Decay inside a chunk: factors on the state, on pairs and on keys, and their gradient.

Token t multiplies the state before it by ``exp(d_t)``. With ``A_t = d_1 + ... + d_t`` in a chunk of
C tokens, numbered from 0, and the first key in the state already:

- the state before the chunk decays by ``exp(d_0)``;
- row t reads the state with the first key times ``exp(A_t)``, and key ``s >= 1`` times
  ``exp(A_t - A_s)``;
- after the chunk the state with the first key has decayed by ``exp(A_{C-1})``, and key s by
  ``exp(A_{C-1} - A_s)``.

Layout and letters are those of :mod:`.chunk_state`.

Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
arXiv:2312.06635, has the chunked form; Dao and Gu, "Transformers are SSMs", arXiv:2405.21060, that
of one decay a head. The running maxima and the gradient by parts are this package's own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.decay import LOWEST_DECAY
from fast_attention.linear.rounded_products import Einsum, sums
from fast_attention.linear.types import Inputs


def _step(size: int) -> float:
    """The unit of coarse decays: sums of a chunk are below 2^24 of it, and so exact in float32.

    A decay is a multiple of the unit and a rest. Differences of sums are then as exact as the
    decays between the two tokens, also behind decays that forget everything.
    """
    return 2.0 ** (math.ceil(math.log2(size * -LOWEST_DECAY)) - 24)


class ChunkDecay(NamedTuple):
    """Logarithms of the factors.

    Attributes:
      first: on the state before the chunk, ``[B, K]``.
      rows: on the state with the first key, as rows read it, ``[B, K, R]``.
      pairs: on keys, as rows read them, ``[B, K, R, C]``; 0 for keys behind a row.
      keys: on keys in the state after the chunk, ``[B, K, C]``.
      whole: on the state with the first key, in the state after the chunk, ``[B, K]``.
    """

    first: Array
    rows: Array
    pairs: Array
    keys: Array
    whole: Array


def chunk_decay(inputs: Inputs, start: Array | int, size: int) -> ChunkDecay | None:
    """Returns the decay of a chunk, or None where there is none."""
    if inputs.log_decay is None:
        return None
    groups = inputs.query.shape[2] // inputs.key.shape[2]
    piece = jax.lax.dynamic_slice_in_dim(inputs.log_decay, start, size, axis=1)
    steps = jnp.swapaxes(piece, 1, 2)
    coarse, rest = decay_until(steps)
    until = coarse + rest
    coarse, rest = (x[..., :, None] - x[..., None, :] for x in (coarse, rest))
    position = jnp.arange(size)
    behind = (position[:, None] < position[None])[None, None]
    pairs = jnp.where(behind, 0, coarse + rest)
    return ChunkDecay(
        first=steps[..., 0],
        rows=jnp.tile(until, (1, 1, groups)),
        pairs=jnp.tile(pairs, (1, 1, groups, 1)),
        keys=pairs[..., -1, :],
        whole=until[..., -1],
    )


def decay_until(steps: Array) -> tuple[Array, Array]:
    """Sums the decays after the first of some tokens, ``[B, K, N]``, up to each of them.

    Returns:
      The sums of coarse decays and of rests: the difference between two tokens is to be taken of
      each by itself.
    """
    size = steps.shape[-1]
    position = jnp.arange(size)
    # The first one decays nothing among them.
    inside = jnp.where((position > 0)[None, None], steps, 0)
    unit = _step(size)
    coarse = jax.lax.stop_gradient(jnp.round(inside / unit) * unit)
    # A product takes XLA on CPU far less time than a cumulative sum.
    past = (position[:, None] <= position[None]).astype(inside.dtype)
    coarse, rest = (sums("bks,st->bkt", x, past) for x in (coarse, inside - coarse))
    return coarse, rest


class DecayedSums(NamedTuple):
    """What factors of a chunk multiply, times its cotangent.

    Attributes:
      until: over the rows at a position less over the keys there, of pairs and of the state that
        the rows read, ``[B, K, C]``; the cotangent of A. That of the first token counts for
        nothing.
      keys: of keys in the state after the chunk, ``[B, K, C]``.
      whole: of the state with the first key, in the state after the chunk, ``[B, K]``.
    """

    until: Array
    keys: Array
    whole: Array


def pull_back_decay(found: DecayedSums) -> Array:
    """Returns the gradient of the decays of tokens 1 to C, ``[B, K, C]``.

    Token C is the first one after the chunk: it decays the whole state that the chunk leaves. That
    of the chunk's own first token comes from the chunk before.
    """
    position = jnp.arange(found.until.shape[-1])
    # Token t decays what the rows from t on read, and what the keys before t leave.
    behind = position[:, None] >= position[None]
    from_on = sums("bkt,ts->bks", found.until, behind.astype(found.until.dtype))
    left = sums("bks,st->bkt", found.keys, behind.T.astype(found.until.dtype))
    left = left + found.whole[..., None]
    from_on = jnp.pad(from_on[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return from_on + left


def decayed_sums(
    read: Any,
    first: Any,
    absorbed: Any,
    value: Array,
    d_rows: Any,
    d_pairs: Array,
    after: tuple[Array, Array],
    einsum: Einsum,
) -> DecayedSums:
    """Collects what each factor of a chunk multiplies, times its cotangent.

    What a row reads from the state is summed over features: the sum of a whole row less its pairs
    is the same number, but rounding in bfloat16 would exceed what strong decays leave of it.

    Args:
      read: from :func:`.causal_chunk.read_causal`.
      first: the state that the rows read.
      absorbed: from :func:`.chunk_state.absorb_keys`.
      value: of the keys.
      d_rows: cotangents of what the rows computed.
      d_pairs: weights of pairs times their cotangents, ``[B, K, R, C]``.
      after: cotangents of ``kv`` and ``k_sum`` after the chunk.
      einsum: the matrix products.
    """
    d_kv, d_k_sum = after
    gain = read.gain
    # This product and that for `d_value` are those of other gradients, and computed once.
    d_read = einsum("bkrv,bkvm->bkrm", d_rows.numerator * gain[..., None], first.kv, rounded=False)
    d_read = d_read + (d_rows.denominator * gain)[..., None] * first.k_sum[..., None, :]
    d_value = einsum("bkcm,bkvm->bkcv", absorbed.features, d_kv)
    batch, heads, num_rows, size = d_pairs.shape
    position = jnp.arange(size)
    # A key has not decayed for its own row.
    others = jnp.tile(position[:, None] != position[None], (num_rows // size, 1))[None, None]
    d_pairs = jnp.where(others, d_pairs, 0)
    rows = _sums_over_last(read.read.features * d_read) + _sums_over_last(d_pairs)
    rows = rows.reshape(batch, heads, -1, size).sum(axis=2)
    of_pairs = d_pairs.sum(axis=-2)
    of_sums = sums("bkcm,bkm->bkc", absorbed.features, d_k_sum)
    whole = sums("bkvm,bkvm->bk", first.kv, d_kv * absorbed.decay[..., None, :])
    return DecayedSums(
        until=rows - of_pairs,
        keys=_sums_over_last(value * d_value) + of_sums,
        whole=whole + (first.k_sum * d_k_sum * absorbed.decay).sum(axis=-1),
    )


def _sums_over_last(x: Array) -> Array:
    """Sums ``[B, K, R, N]`` over N, as a product: XLA on CPU would fuse a sum with its terms."""
    return sums("bkrn,n->bkr", x, jnp.ones(x.shape[-1:], x.dtype))
