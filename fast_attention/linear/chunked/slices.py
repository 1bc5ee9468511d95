"""Chunks of the inputs in the layout of :mod:`.chunk_state`, and chunks of outputs back in place.

Slices are taken from the arrays as they lie, ``[B, T, H, D]``, and only the slice is transposed:
moving whole arrays first costs a quarter more time on CPU.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, G = H / K, D head width,
C chunk.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import Features
from fast_attention.linear.chunked.causal_chunk import Sight
from fast_attention.linear.chunked.wide_pairs import Exponents
from fast_attention.linear.state import bias_features, mask_features
from fast_attention.linear.types import Inputs, Plan


def load(x: Array, start: Array | int, size: int, dtype: Any = None) -> Array:
    """Returns ``[start, start + size)`` of ``[B, T, K, ...]`` as ``[B, K, size, ...]``."""
    piece = jnp.swapaxes(_slice(x, start, size), 1, 2)
    return piece if dtype is None else piece.astype(dtype)


def load_contiguous(x: Array, start: Array | int, size: int, dtype: Any) -> Array:
    """Returns the same as :func:`load`, for a piece that goes into products as it is.

    XLA on CPU would make the heads of a piece of :func:`_slice` one after the other, four times as
    slow as a transposed copy. Where something is computed of the piece, it makes that copy anyway.
    """

    def transposed(x: Array, start: Array) -> Array:
        return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), 1, 2)

    def default(x: Array, start: Array) -> Array:
        return load(x, start, size)

    piece = jax.lax.platform_dependent(x, jnp.asarray(start), cpu=transposed, default=default)
    return piece.astype(dtype)


def load_rows(
    inputs: Inputs, x: Array, start: Array | int, size: int, dtype: Any, chunks: int = 1
) -> Array:
    """Returns ``[B, T, H, ...]`` as ``[B, K, G * size, ...]``: rows of one key head together.

    If the piece holds several chunks, the rows of each are together: ``[B, K, N * G * C, ...]``.
    """
    kv_heads = inputs.key.shape[2]
    piece = _slice(x, start, size)
    batch, _, heads, *rest = piece.shape
    piece = piece.reshape(batch, chunks, size // chunks, kv_heads, heads // kv_heads, *rest)
    piece = jnp.moveaxis(piece, (3, 1, 4, 2), (1, 2, 3, 4))
    return piece.reshape(batch, kv_heads, -1, *rest).astype(dtype)


def unload_rows(rows: Array, size: int, chunks: int = 1) -> Array:
    """Inverse of :func:`load_rows`: ``[B, K, G * size, ...]`` to ``[B, size, H, ...]``."""
    batch, kv_heads, _, *rest = rows.shape
    piece = rows.reshape(batch, kv_heads, chunks, -1, size // chunks, *rest)
    piece = jnp.moveaxis(piece, (1, 2, 3, 4), (3, 1, 4, 2))
    return piece.reshape(batch, size, -1, *rest)


def store(buffer: Array, piece: Array, start: Array | int) -> Array:
    """Writes ``[B, C, ...]`` into ``[B, T, ...]`` at ``start``."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, piece.astype(buffer.dtype), start, axis=1)


def _slice(x: Array, start: Array | int, size: int) -> Array:
    """Returns ``[start, start + size)`` of ``[B, T, ...]``.

    Heads and width are one axis while it is cut: else XLA for GPUs moves heads before time in the
    whole array, before the loop over chunks, to spare the chunks doing so.
    """
    flat = x.reshape(*x.shape[:2], -1)
    piece = jax.lax.dynamic_slice_in_dim(flat, start, size, axis=1)
    return piece.reshape(x.shape[0], size, *x.shape[2:])


def compute_dtype(inputs: Inputs) -> Any:
    """The type of the state, in which everything is computed."""
    return inputs.state.kv.dtype


def query_features(
    plan: Plan, inputs: Inputs, start: Array | int, size: int, chunks: int = 1
) -> Any:
    """Returns features of queries as :func:`load_rows` does, and what pulls a cotangent back."""
    rows = load_rows(inputs, inputs.query, start, size, compute_dtype(inputs), chunks)

    def apply(rows, parameters):
        return plan.feature_map.apply(rows, parameters, is_query=True, exact_scale=plan.exact_scale)

    queries, pull = jax.vjp(apply, rows, inputs.parameters)

    def pull_back(cotangent: Features):
        d_rows, d_parameters = pull(cotangent)
        return unload_rows(d_rows, size, chunks), d_parameters

    return queries, pull_back


def key_features(plan: Plan, inputs: Inputs, start: Array | int, size: int):
    """Returns features of a chunk of keys, its values, and what pulls cotangents back."""
    dtype = compute_dtype(inputs)
    key = load(inputs.key, start, size, dtype)
    value = load(inputs.value, start, size, dtype)
    mask = None
    if inputs.key_mask is not None:
        mask = load(inputs.key_mask, start, size)
        # Whatever lies in padding, nan and inf included, must not reach a product.
        key = jnp.where(mask[..., None], key, 0)
        value = jnp.where(mask[..., None], value, 0)
    bias = None
    if inputs.key_bias is not None:
        bias = load(inputs.key_bias, start, size, dtype)

    def apply(key, parameters, bias):
        features = plan.feature_map.apply(
            key, parameters, is_query=False, exact_scale=plan.exact_scale
        )
        return mask_features(bias_features(features, bias), mask)

    keys, pull = jax.vjp(apply, key, inputs.parameters, bias)

    def pull_back(cotangent: Features, d_value: Array):
        d_key, d_parameters, d_bias = pull(cotangent)
        if mask is not None:
            d_value = jnp.where(mask[..., None], d_value, 0)
        return jnp.swapaxes(d_key, 1, 2), jnp.swapaxes(d_value, 1, 2), d_parameters, d_bias

    return keys, value, pull_back


def exponents_of(
    plan: Plan, inputs: Inputs, row: Array | int, start: Array | int, size: int
) -> Exponents:
    """Returns what makes the exponents of queries from ``row`` and keys from ``start`` on."""
    dtype = compute_dtype(inputs)

    def of_rows() -> Any:
        return query_features(plan, inputs, row, size)[0].log

    def of_keys(places: Array) -> Any:
        def taken(x):
            x = load(x, start, size, dtype)
            index = places.reshape(*places.shape, *(1,) * (x.ndim - places.ndim))
            return jnp.take_along_axis(x, index, axis=2)

        features = plan.feature_map.apply(
            taken(inputs.key), inputs.parameters, is_query=False, exact_scale=plan.exact_scale
        )
        bias = inputs.key_bias
        return bias_features(features, None if bias is None else taken(bias)).log

    return Exponents(of_rows, of_keys)


def causal_sight(inputs: Inputs, start: Array | int, size: int) -> Sight:
    """Returns who sees whom in a causal chunk, within segments if there are any."""
    groups = inputs.query.shape[2] // inputs.key.shape[2]
    position = jnp.arange(size)
    # The first key is read through the state.
    pairs = (position[None, :] <= position[:, None]) & (position[None, :] > 0)
    pairs = jnp.tile(pairs, (groups, 1))[None, None]
    later = (position > 0)[None, None]
    occupied = inputs.key_mask is None
    if inputs.segment_ids is None:
        return Sight(pairs, later, occupied=occupied)
    ids = jax.lax.dynamic_slice_in_dim(inputs.segment_ids, start, size, axis=1)
    before = jax.lax.dynamic_slice_in_dim(inputs.segment_ids, jnp.maximum(start - 1, 0), 1, axis=1)[
        :, 0
    ]
    first, last = ids[:, 0], ids[:, -1]
    rows = jnp.tile(ids, (1, groups))
    return Sight(
        pairs=pairs & (rows[:, None, :, None] == ids[:, None, None, :]),
        state=(rows == first[:, None])[:, None],
        carry=(before == first)[:, None],
        keep=(first == last)[:, None],
        enter=later & (ids == last[:, None])[:, None],
        occupied=occupied,
    )
