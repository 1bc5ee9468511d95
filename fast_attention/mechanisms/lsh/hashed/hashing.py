"""Angular hashing: the bucket of a vector is the nearest of random directions.

    bucket(x) = argmax [x R, -x R]

Vectors at a small angle mostly share a bucket (arXiv:1509.02897). The bucket does not depend on the
norm of a vector, so queries and keys of shared query-key attention have the same buckets.

Shape letters: N rows (batch x heads), S length, D width, R rounds, J buckets (even).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float, Int

# Products computed at once, per row: on a CPU what stays in the cache.
_CPU_PRODUCTS = 2**17
_DEVICE_PRODUCTS = 2**25


def draw_rotations(
    key: Array, head_dim: int, n_buckets: int, *, n_rounds: int, rows: int = 1
) -> Float[Array, "N D R half"]:
    """Draws random directions, unit normal.

    Args:
      key: random key.
      head_dim: D.
      n_buckets: J; half as many directions are drawn, each with its opposite.
      n_rounds: R, or 1 where all rounds take their buckets from one rotation.
      rows: 1 to share them, or N.

    Returns:
      float32 ``[rows, D, R, J / 2]``.

    Raises:
      ValueError: if J is odd.
    """
    if n_buckets % 2:
        raise ValueError(f"Buckets come in opposite pairs: n_buckets must be even, got {n_buckets}")
    return jax.random.normal(key, (rows, head_dim, n_rounds, n_buckets // 2))


def hash_vectors(
    x: Float[Array, "N S D"],
    rotations: Float[Array, "N D R half"],
    *,
    n_hashes: int,
    rehash_each_round: bool = True,
    precision: jax.lax.PrecisionLike = None,
) -> Int[Array, "N R S"]:
    """Finds the bucket of every vector in every round.

    Args:
      x: ``[N, S, D]``.
      rotations: ``[N or 1, D, R, J / 2]``; R is 1 unless each round has its own.
      n_hashes: R.
      rehash_each_round: with a rotation of its own for each round; otherwise a vector enters its R
        best buckets of one rotation, the best in the last round (all J if there are no more).
      precision: of the products with rotations.

    Returns:
      int32 ``[N, R, S]``, numbers below J.

    Raises:
      ValueError: if the rotations are not for these vectors and rounds.
    """
    rows, length, width = x.shape
    n_rotations = n_hashes if rehash_each_round else 1
    if rotations.shape[:-1] not in [(r, width, n_rotations) for r in (1, rows)]:
        raise ValueError(
            f"rotations must be [1 or {rows} rows, {width} features, {n_rotations} rounds, half of "
            f"the buckets], got {rotations.shape}."
        )
    half = rotations.shape[-1]
    on_cpu = jax.default_backend() == "cpu"
    most = _CPU_PRODUCTS if on_cpu else _DEVICE_PRODUCTS
    block = max(1, min(length, most // max(1, n_rotations * half)))
    blocks = -(-length // block)
    compute = at_least_float32(x.dtype)
    shared = rotations.shape[0] == 1
    rotations = jnp.moveaxis(rotations, 1, -1).astype(compute).reshape(len(rotations), -1, width)

    def hash_block(x: Array, rotation: Array) -> Array:
        # The length last: the search for the largest then runs over whole vectors.
        products = jnp.einsum(
            "jd,sd->js", rotation, x, precision=precision, preferred_element_type=compute
        )
        products = products.reshape(n_rotations, half, -1)
        if rehash_each_round:
            return _first_largest(products)
        scores = jnp.concatenate([products[0], -products[0]]).T
        return lax.top_k(scores, min(n_hashes, 2 * half))[1].T[::-1]

    def hash_row(row: tuple[Array, Array]) -> Array:
        x, number = row
        rotation = rotations[0 if shared else number]
        x = jnp.pad(x, [(0, blocks * block - length), (0, 0)]).astype(compute)
        found = lax.map(lambda part: hash_block(part, rotation), x.reshape(blocks, block, width))
        return jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1)[:, :length]

    operands = (lax.stop_gradient(x), jnp.arange(rows))
    if on_cpu or rows * n_rotations * half > most:
        return lax.map(hash_row, operands)
    return jax.vmap(hash_row)(operands)


def _first_largest(products: Array) -> Array:
    """Index of the first largest entry of ``[x, -x]`` along axis 1: ``[R, J / 2, S] -> [R, S]``.

    Two plain reductions, which vectorise where a search for an index does not.
    """
    half = products.shape[1]
    largest = jnp.max(jnp.abs(products), axis=1, keepdims=True)
    number = lax.broadcasted_iota(jnp.int32, products.shape, 1)
    opposite = jnp.where(products == -largest, number + half, 2 * half - 1)
    return jnp.min(jnp.where(products == largest, number, opposite), axis=1)
