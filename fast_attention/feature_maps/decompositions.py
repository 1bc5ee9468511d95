"""Decompositions of batches of small matrices that may run at the same time.

jaxlib 0.10 splits a LAPACK call on a batch into several tasks of the program's thread pool, and
waits for them. Two such calls at the same time (two layers of a model, or two roots of one layer)
can occupy all threads of the pool and deadlock. A call on one matrix starts no tasks. So on CPU the
functions here loop over the matrices of a batch, also if ``jax.vmap`` adds an axis; other platforms
process the batch at once.

Shape letters: B batch, D rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Float


def cholesky(square: Float[Array, "*B D D"]) -> Float[Array, "*B D D"]:
    """Returns the lower triangles L with ``L L^T`` equal to symmetric positive matrices.

    Entries are NaN if a matrix is not positive. Differentiable.
    """
    return _cholesky(0.5 * (square + square.mT))


@jax.custom_jvp
def _cholesky(square: Array) -> Array:
    return _lower_triangles(square)


@_cholesky.defjvp
def _(primals, tangents):
    (square,), (change,) = primals, tangents
    root = _cholesky(square)
    inverse = invert_lower(root)
    middle = multiply(multiply(inverse, change), inverse.mT)
    halved = np.tril(np.ones(middle.shape[-2:])) - 0.5 * np.eye(middle.shape[-1])
    half = middle * jnp.broadcast_to(jnp.asarray(halved, middle.dtype), middle.shape)
    return root, multiply(root, half)


@jax.custom_jvp
def invert_lower(triangle: Float[Array, "*B D D"]) -> Float[Array, "*B D D"]:
    """Returns the inverses of lower triangles. Differentiable."""
    return _inverses_of_lower(triangle)


@invert_lower.defjvp
def _(primals, tangents):
    (triangle,), (change,) = primals, tangents
    inverse = invert_lower(triangle)
    return inverse, -multiply(multiply(inverse, jnp.tril(change)), inverse)


def eigh(square: Float[Array, "*B D D"]) -> tuple[Float[Array, "*B D"], Float[Array, "*B D D"]]:
    """Returns eigenvalues, ascending, and eigenvectors (columns) of symmetric matrices.

    Not differentiable: gradients stop here.
    """
    return _eigenvectors(jax.lax.stop_gradient(square))


def qr(square: Float[Array, "*B D D"]) -> tuple[Float[Array, "*B D D"], Float[Array, "*B D D"]]:
    """Returns ``Q, R`` of square matrices, the diagonal of R not negative.

    Not differentiable: gradients stop here.
    """
    q, r = _orthogonal_and_upper(jax.lax.stop_gradient(square))
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(r.dtype)
    return q * sign[..., None, :], r * sign[..., :, None]


def _one_at_a_time(decompose: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Extends a function of one matrix, or a batch, to ``[*B, D, D]``; see the module."""

    def loop(matrices: Array) -> object:
        flat = matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])
        # Starts from the input, not from zeros: inside shard_map a loop keeps how its carry varies.
        start = jax.tree.map(
            lambda like: flat if like.ndim == 3 else flat[..., 0],
            jax.eval_shape(decompose, flat),
        )

        def body(index: Array, found: object) -> object:
            one = decompose(jax.lax.dynamic_index_in_dim(flat, index, keepdims=False))
            return jax.tree.map(lambda all_, own: all_.at[index].set(own), found, one)

        found = jax.lax.fori_loop(0, flat.shape[0], body, start)
        return jax.tree.map(lambda x: x.reshape(*matrices.shape[:-2], *x.shape[1:]), found)

    @jax.custom_batching.custom_vmap
    def of_batch(matrices: Array) -> object:
        if matrices.ndim == 2 or 0 in matrices.shape:
            return decompose(matrices)
        return jax.lax.platform_dependent(matrices, cpu=loop, default=decompose)

    @of_batch.def_vmap
    def _(axis_size, in_batched, matrices):
        del axis_size, in_batched  # Always batched, or this were not called.
        found = of_batch(matrices)
        return found, jax.tree.map(lambda _: True, found)

    return of_batch


def _invert_lower_one(triangle: Array) -> Array:
    eye = jnp.broadcast_to(jnp.eye(triangle.shape[-1], dtype=triangle.dtype), triangle.shape)
    return jax.scipy.linalg.solve_triangular(triangle, eye, lower=True)


_lower_triangles = _one_at_a_time(lambda x: jax.lax.linalg.cholesky(x, symmetrize_input=False))
_inverses_of_lower = _one_at_a_time(_invert_lower_one)
_eigenvectors = _one_at_a_time(lambda x: tuple(jnp.linalg.eigh(x)))
_orthogonal_and_upper = _one_at_a_time(lambda x: tuple(jnp.linalg.qr(x)))


def multiply(left: Float[Array, "*B N D"], right: Float[Array, "*B D M"]) -> Float[Array, "*B N M"]:
    """Returns the product of matrices, in full precision."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
