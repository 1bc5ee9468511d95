"""Baselines in JAX: exact attention, doing nothing, and the least that must be computed.

Shape letters: B batch, T length, H heads, D head width, M features, C chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.per_token import softmax_features
from fast_attention.arrays.types import Array, Float


def whole_sequence(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    projection: Float[Array, "M D"],
) -> Float[Array, "B T H D"]:
    """Bidirectional FAVOR+ as first published: features of all positions, then two einsums."""
    query = softmax_features(query, projection, is_query=True)
    key = softmax_features(key, projection, is_query=False)
    sums = jnp.einsum("bthm,bthd->bhmd", key, value)
    numerator = jnp.einsum("bthm,bhmd->bthd", query, sums)
    denominator = jnp.einsum("bthm,bhm->bth", query, key.sum(1))
    return numerator / denominator[..., None]


def identity(
    query: Float[Array, "B T H D"], key: Float[Array, "B T H D"], value: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Returns the values, copied: what reading and writing costs, with any attention."""
    del query, key
    return value * 1


def matmul_floor(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    projection: Float[Array, "M D"],
    chunk: int = 128,
) -> Float[Array, "B T H D"]:
    """Does the four products of bidirectional attention with M features and nothing else.

    Queries and keys projected, values and projected keys summed into a state, the state read: in
    one loop over chunks that stay in the cache, so that the state read is that of the chunks so
    far. No exponential, no denominator: not attention, but no attention with these features can be
    faster with the same products.

    Raises:
      NotImplementedError: if chunks do not divide the length.
    """
    batch, length, heads, width = query.shape
    chunk = min(chunk, length)
    if length % chunk:
        raise NotImplementedError(f"the length must be a multiple of {chunk}, got {length}.")

    def rows(x: Array, start: Array) -> Array:
        x = lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
        return jnp.swapaxes(x, 1, 2).reshape(batch * heads, chunk, width)

    def body(carry, i):
        state, out = carry
        start = i * chunk
        queries = jnp.einsum("hcd,md->hcm", rows(query, start), projection)
        keys = jnp.einsum("hcd,md->hcm", rows(key, start), projection)
        # The orientation of the state that runs fastest on a CPU: features last.
        state = state + jnp.einsum("hcm,hcd->hdm", keys, rows(value, start))
        read = jnp.einsum("hcm,hdm->hcd", queries, state)
        read = jnp.swapaxes(read.reshape(batch, heads, chunk, width), 1, 2)
        return (state, lax.dynamic_update_slice_in_dim(out, read, start, axis=1)), None

    state = jnp.zeros((batch * heads, width, projection.shape[0]), query.dtype)
    carry = (state, jnp.zeros_like(value))
    return lax.scan(body, carry, jnp.arange(length // chunk))[0][1]


def exact(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    *,
    causal: bool,
    cudnn: bool = False,
) -> Float[Array, "B T H D"]:
    """Exact softmax attention, as jax has it.

    Raises:
      NotImplementedError: if cuDNN does not take the shape or the type.
    """
    if not cudnn:
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal)
    try:
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=causal, implementation="cudnn"
        )
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError(f"cuDNN: {error}") from error
