"""Random projections ``W [M, D]`` with standard Gaussian rows, independent or coupled.

Shape letters: D head width, M features (rows), N rows of a block.

References:
  Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794, section 2.4 and
  appendix B (orthogonal features). Mezzadri, "How to generate random matrices from the classical
  compact groups", arXiv:math-ph/0609050 (why QR needs the signs of the diagonal of R). Reid et
  al., "Simplex Random Features", arXiv:2301.13856. Yu et al., "Orthogonal Random Features",
  arXiv:1610.09072 (products of Hadamard matrices and random signs).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.decompositions import multiply, qr


def iid_projection(key: Array, num_rows: int, dim: int) -> Float[Array, "M D"]:
    """Draws ``num_rows`` independent rows from N(0, I).

    Args:
      key: a JAX random key.
      num_rows: M, at least 1.
      dim: D, at least 1.

    Returns:
      float32 ``[M, D]``.

    Raises:
      ValueError: if a size is below 1.
    """
    _check_sizes(num_rows, dim)
    return jax.random.normal(key, (num_rows, dim), jnp.float32)


def haar_orthogonal(key: Array, num_blocks: int, dim: int) -> Float[Array, "N D D"]:
    """Draws independent orthogonal matrices, uniformly (Haar) distributed.

    They are the Q of Gaussian matrices with a positive diagonal of R. With the signs that LAPACK
    returns, they would not be uniform.

    Returns:
      float32 ``[num_blocks, D, D]``.
    """
    gaussian = jax.random.normal(key, (num_blocks, dim, dim), jnp.float32)
    return qr(gaussian)[0]


def orthogonal_projection(
    key: Array, num_rows: int, dim: int, *, scaling: float = 0.0
) -> Float[Array, "M D"]:
    """Draws rows that are orthogonal within each block of D; blocks are independent.

    With ``scaling=0`` each row has the norm of an independent Gaussian vector, so each single row
    is exactly N(0, I) and kernel estimates are unbiased. With ``scaling=1`` every row has norm
    sqrt(D): lower variance, but the estimated kernel is the regularised softmax kernel
    (arXiv:2009.14794, theorem 1).

    Args:
      key: a JAX random key; blocks and row norms use independent keys split from it.
      num_rows: M, any positive number; the last block is truncated if D does not divide M.
      dim: D.
      scaling: 0 or 1.

    Returns:
      float32 ``[M, D]``.

    Raises:
      ValueError: if a size is below 1 or ``scaling`` is neither 0 nor 1.
    """
    _check_sizes(num_rows, dim)
    if scaling not in (0, 1):
        raise ValueError(
            f"ortho_scaling must be 0 (row norms of Gaussian vectors) or 1 (row norm sqrt({dim})), "
            f"got {scaling!r}."
        )
    block_key, length_key = jax.random.split(key)
    num_blocks = -(-num_rows // dim)
    rows = haar_orthogonal(block_key, num_blocks, dim).reshape(num_blocks * dim, dim)[:num_rows]
    if scaling == 1:
        return rows * jnp.sqrt(jnp.float32(dim))
    return rows * _gaussian_lengths(length_key, num_rows, dim)


def orthogonal_sqrt_d_projection(key: Array, num_rows: int, dim: int) -> Float[Array, "M D"]:
    """Orthogonal rows of norm sqrt(D): :func:`orthogonal_projection` with ``scaling=1``."""
    return orthogonal_projection(key, num_rows, dim, scaling=1.0)


def simplex_projection(key: Array, num_rows: int, dim: int) -> Float[Array, "M D"]:
    """Draws blocks of rows that point to the corners of a simplex (arXiv:2301.13856).

    The N <= D rows of a block have pairwise cosines ``-1 / (N - 1)``, a random rotation, and the
    norms of independent Gaussian vectors: each single row is exactly N(0, I).

    Args:
      key: a JAX random key.
      num_rows: M, any positive number.
      dim: D.

    Returns:
      float32 ``[M, D]``.

    Raises:
      ValueError: if a size is below 1.
    """
    _check_sizes(num_rows, dim)
    block_key, length_key = jax.random.split(key)
    num_blocks = -(-num_rows // dim)
    turns = haar_orthogonal(block_key, num_blocks, dim)
    blocks = [
        multiply(jnp.asarray(_simplex(min(dim, num_rows - start), dim)), turn)
        for start, turn in zip(range(0, num_rows, dim), turns, strict=True)
    ]
    return jnp.concatenate(blocks) * _gaussian_lengths(length_key, num_rows, dim)


def hadamard_projection(key: Array, num_rows: int, dim: int) -> Float[Array, "M D"]:
    """Draws blocks ``H D3 H D2 H D1`` of Hadamard matrices and random signs (arXiv:1610.09072).

    D is padded to a power of two N, and rows have the norms of Gaussian vectors of width N. Rows
    are only approximately N(0, I), because the number of directions is finite; the approximation
    improves with the width. It is drawn without QR; the product with it costs as much as with any
    projection.

    Args:
      key: a JAX random key.
      num_rows: M, any positive number.
      dim: D.

    Returns:
      float32 ``[M, D]``.

    Raises:
      ValueError: if a size is below 1.
    """
    _check_sizes(num_rows, dim)
    width = 1 << (dim - 1).bit_length()
    num_blocks = -(-num_rows // width)
    sign_key, length_key = jax.random.split(key)
    bits = jax.random.bits(sign_key, (3, num_blocks, 1, width), jnp.uint32)
    signs = jnp.where(bits % 2 == 0, jnp.float32(1), jnp.float32(-1))
    hadamard = jnp.asarray(_hadamard(width))[None]
    block = hadamard * signs[0]
    for sign in signs[1:]:
        block = multiply(hadamard * sign, block)
    rows = block.reshape(num_blocks * width, width)[:num_rows, :dim]
    return rows * _gaussian_lengths(length_key, num_rows, width)


def _simplex(count: int, dim: int) -> np.ndarray:
    """``count <= dim`` unit vectors of equal angles, ``[count, dim]``."""
    corners = np.eye(count, dim)
    if count > 1:
        corners[:, :count] -= 1 / count
        corners /= np.linalg.norm(corners, axis=1, keepdims=True)
    return corners.astype(np.float32)


def _hadamard(width: int) -> np.ndarray:
    """The orthogonal symmetric matrix of entries ``+-width^(-1/2)``, width a power of two."""
    signs = np.ones((1, 1))
    while len(signs) < width:
        signs = np.kron([[1, 1], [1, -1]], signs)
    return (signs / np.sqrt(width)).astype(np.float32)


def _gaussian_lengths(key: Array, num_rows: int, dim: int) -> Float[Array, "M 1"]:
    normal = jax.random.normal(key, (num_rows, dim), jnp.float32)
    return jnp.linalg.norm(normal, axis=1)[:, None]


PROJECTIONS: dict[str, Callable[[Array, int, int], Array]] = {
    "iid": iid_projection,
    "orthogonal": orthogonal_projection,
    "orthogonal_sqrt_d": orthogonal_sqrt_d_projection,
    "simplex": simplex_projection,
    "hadamard": hadamard_projection,
}
"""Projections by name; each takes a key, M and D."""

ANTITHETIC = "_antithetic"
"""Suffix of a name: half as many rows, each used with both signs by maps that support it."""


def draw_projection(name: str, key: Array, num_rows: int, dim: int) -> Float[Array, "M D"]:
    """Draws the projection called ``name``; see :data:`PROJECTIONS`.

    Raises:
      ValueError: for an unknown name, or sizes below 1.
    """
    if name not in PROJECTIONS:
        raise ValueError(f"Unknown projection {name!r}; choose one of {sorted(PROJECTIONS)}.")
    return PROJECTIONS[name](key, num_rows, dim)


def redraw_rows(name: str, key: Array, rows: Float[Array, "*B M D"]) -> Float[Array, "*B M D"]:
    """Draws new rows of the projection called ``name``, in the shape of others."""
    *leading, num_rows, width = rows.shape
    keys = jax.random.split(key, math.prod(leading))
    drawn = jax.vmap(lambda k: draw_projection(name, k, num_rows, width))(keys)
    return drawn.reshape(rows.shape)


def _check_sizes(num_rows: int, dim: int) -> None:
    if num_rows < 1 or dim < 1:
        raise ValueError(
            f"A projection needs at least one row and one column, got num_rows={num_rows} and "
            f"dim={dim}."
        )
