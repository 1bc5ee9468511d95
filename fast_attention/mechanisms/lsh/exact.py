"""Exact attention with shared queries and keys: that of Reformer without hashing.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j,   k_j = q_j / |q_j|      (arXiv:2001.04451)

The logit of a position with itself is -5e4: it sees itself only if it sees nothing else.

Shape letters: B batch, T queries, S positions (queries, then given keys), H heads, K value heads,
D head width, V value width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.checks import full_rank
from fast_attention.mechanisms.lsh.operands import LSHOutput, place_queries
from fast_attention.mechanisms.rotary import rotate
from fast_attention.mechanisms.shared_qk import unit_keys
from fast_attention.mechanisms.softmax.blocks import Choices, Extras, Tiling, blocked_attention

# One part whatever the length: few programs to compile, and a small block of scores.
_CPU_TILING = Tiling(rows=2**17, block=2**20, smallest=64, stages=1)
_DEVICE_TILING = Tiling(rows=2**27, block=2**27, smallest=256, stages=1)


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
    dropout: Dropout | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_weights: bool = False,
) -> Float[Array, "*B T H V"] | LSHOutput:
    """Attends from the first positions to all, one block of queries after another.

    No matrix ``[T, S]`` is kept, forward or backward, unless the weights are requested.

    Args:
      qk: ``[*B, S, H, D]``, shared queries and keys: the first T positions are queries, all are
        keys.
      value: ``[*B, S, K, V]``; K divides H.
      causal: a query sees positions up to its own, and all given keys.
      query_length: T, by default S. Positions from T on are given keys, such as memory or context.
      key_mask: ``[*B, S]``, False is padding: it is not attended to, and its output is 0.
      mask: broadcastable to ``[*B, H, T, S]``, True sees. Unlike in hashed attention, False also
        applies to the position itself.
      rotary: rotate pairs of neighbouring features by position.
      positions: ``[*B, T]`` of the queries, by default 0, 1, ..; given keys are not rotated.
      scale: of the logits, by default ``D ** -0.5``.
      dropout: of the weights.
      precision: of the products.
      return_weights: also the weights, float32 and before dropout.

    Returns:
      ``[*B, T, H, V]``, zeros for a query that sees nothing; an :class:`LSHOutput`
      with ``return_weights``.

    Raises:
      ValueError: for shapes that do not fit.
    """
    *batch, length, heads, _ = qk.shape
    queries = length if query_length is None else query_length
    if value.shape[:-2] != qk.shape[:-2] or heads % max(1, value.shape[-2]):
        raise ValueError(
            "Expected qk [*batch, length, heads, width] and value [*batch, length, value heads, "
            f"value width], value heads dividing heads, got {qk.shape} and {value.shape}."
        )
    if not min(1, length) <= queries <= length:
        raise ValueError(f"query_length={queries} must be between 1 and the {length} positions.")
    if positions is not None and not rotary:
        raise ValueError("positions need rotary=True: pass both, or neither.")
    dtype = jnp.result_type(qk, value)
    qk, value = qk.astype(dtype), value.astype(dtype)
    compute = at_least_float32(dtype)
    if 0 in (*batch, length):
        weights = jnp.zeros((*batch, heads, queries, length), compute)
        out = jnp.zeros((*batch, queries, heads, value.shape[-1]), dtype)
        return LSHOutput(out, weights, None) if return_weights else out
    shown = None
    if key_mask is not None:
        key_mask = jnp.broadcast_to(key_mask.astype(bool), (*batch, length))
        shown = key_mask[..., None, None]
        qk, value = jnp.where(shown, qk, 0), jnp.where(shown, value, 0)
    if rotary:
        place = place_queries(positions, (*batch, length), queries)
        qk = rotate(qk, place, interleaved=True)
    given = length - queries

    def given_first(x: Array, axis: int) -> Array:
        """Puts given keys before the others: causal queries see all keys up to their own."""
        return jnp.roll(x, given, axis) if given and x.shape[axis] > 1 else x

    extras = Extras(
        mask=None
        if mask is None
        else given_first(full_rank("mask", mask, (*batch, heads, queries, length)), -1),
        key_mask=None if key_mask is None else given_first(key_mask, -1),
        first_query=jnp.asarray(given, jnp.int32) if given else None,
    )
    choices = Choices(causal, precision=precision, shared=True, scale=scale)
    tiling = _CPU_TILING if jax.default_backend() == "cpu" else _DEVICE_TILING

    def attend(query: Array, key: Array, value: Array, dropout: Dropout | None) -> Array:
        key, own_choices, own_extras = given_first(key, -3), choices, extras
        if dropout is not None:
            own_extras = extras._replace(dropout_key=dropout.key)
            own_choices = choices._replace(
                dropout_rate=dropout.rate, share_dropout=dropout.broadcast
            )
        out = blocked_attention(query, key, given_first(value, -3), own_extras, own_choices, tiling)
        return out if shown is None else jnp.where(shown[..., :queries, :, :], out, 0)

    query, key = qk[..., :queries, :, :], unit_keys(qk)
    out = attend(query, key, jnp.repeat(value, heads // value.shape[-2], axis=-2), dropout)
    if not return_weights:
        return out
    # Attention to the rows of an identity matrix is the weights.
    one = jnp.broadcast_to(jnp.eye(length, dtype=compute)[:, None], (*batch, length, heads, length))
    weights = attend(query.astype(compute), key.astype(compute), one, None)
    return LSHOutput(out, jnp.moveaxis(weights, -2, -3), None)
