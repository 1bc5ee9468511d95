"""Decompositions of batches: right, differentiable, mapped, and never waiting for each other."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fast_attention.feature_maps.decompositions import cholesky, eigh, invert_lower, qr

D = 5


def positive(seed, *batch):
    x = np.random.default_rng(seed).normal(size=(*batch, 2 * D, D))
    return jnp.asarray(np.swapaxes(x, -1, -2) @ x / D, jnp.float32)


def rebuild(name, square):
    """The matrix again, from its parts."""
    if name == "cholesky":
        root = cholesky(square)
        return root @ jnp.swapaxes(root, -1, -2)
    if name == "invert_lower":
        return jnp.linalg.inv(invert_lower(jnp.tril(square)))
    if name == "eigh":
        values, vectors = eigh(square)
        return (vectors * values[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
    q, r = qr(square)
    return q @ jnp.triu(r)


NAMES = ("cholesky", "invert_lower", "eigh", "qr")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
def test_the_parts_give_the_matrix_again(name, batch):
    square = positive(0, *batch)
    expected = jnp.tril(square) if name == "invert_lower" else square
    np.testing.assert_allclose(rebuild(name, square), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("decompose", [cholesky, invert_lower, eigh, qr])
def test_mapped_functions_call_lapack_on_one_matrix(decompose):
    """So that no call of a program waits for threads, whatever axes ``vmap`` adds."""
    square = positive(0, 2, 3)
    mapped = jax.jit(jax.vmap(jax.vmap(decompose)))
    jax.tree.map(np.testing.assert_array_equal, mapped(square), decompose(square))
    calls = [line for line in mapped.lower(square).as_text().splitlines() if "@lapack" in line]
    assert calls
    for line in calls:
        results = line[line.rindex("->") :]
        assert "tensor<6x" not in results and "tensor<2x3x" not in results, line


@pytest.mark.parametrize("decompose", [cholesky, lambda x: invert_lower(jnp.tril(x))])
def test_gradients_are_those_of_differences(decompose):
    check_grads(decompose, (positive(0, 2),), order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


PROGRAM = """
import jax, jax.numpy as jnp
from fast_attention.feature_maps.decompositions import cholesky, eigh, invert_lower, qr

x = jax.random.normal(jax.random.key(0), (8, 64, 96, 48))
squares = jnp.einsum("nbij,nbik->nbjk", x, x) / 96

def several(*squares):
    return [f(x) for x in squares for f in (cholesky, invert_lower, eigh, qr)]

run = jax.jit(several)
for _ in range(4):
    jax.block_until_ready(run(*squares))
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="LAPACK runs on CPU")
def test_calls_of_one_program_do_not_wait_for_each_other():
    """A process of its own, which can be ended: with batched calls jaxlib 0.10 never returns."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
