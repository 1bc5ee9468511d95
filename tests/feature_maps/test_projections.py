"""Projections: moments of the sampler, orthogonality, explicit keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import (
    PROJECTIONS,
    draw_projection,
    haar_orthogonal,
    iid_projection,
    orthogonal_projection,
)

DIMS = [1, 4]


def drawn(draw, count, seed=0):
    return np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(seed), count)), np.float64)


@pytest.mark.parametrize("dim", [1, 2, 4, 8, 16])
def test_haar_matrices_are_orthogonal_and_unbiased(dim):
    """QR without the signs of the diagonal of R has a first entry of mean -sqrt(2 / (pi D))."""
    draws = drawn(lambda key: haar_orthogonal(key, 2, dim), 2000).reshape(-1, dim, dim)
    eye = np.broadcast_to(np.eye(dim), draws.shape)
    np.testing.assert_allclose(draws @ draws.transpose(0, 2, 1), eye, atol=1e-5)
    # Entries of a Haar matrix have mean 0 and variance 1 / D.
    error = np.abs(draws.mean(0)).max()
    assert error < 5 / np.sqrt(dim * len(draws))
    assert np.abs((draws**2).mean(0) - 1 / dim).max() < 5 * np.sqrt(2) / dim / np.sqrt(len(draws))
    # Nor do two blocks of one draw know of each other.
    pairs = draws.reshape(-1, 2, dim, dim)
    together = (pairs[:, 0] * pairs[:, 1]).mean(0)
    assert np.abs(together).max() < 5 / dim / np.sqrt(len(pairs))


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize(("rows", "dim"), [(3, 4), (11, 4), (5, 1)])
def test_any_number_of_rows_in_float32(name, rows, dim):
    key = jax.random.key(1)
    projection = draw_projection(name, key, rows, dim)
    assert projection.shape == (rows, dim)
    assert projection.dtype == jnp.float32
    np.testing.assert_array_equal(projection, draw_projection(name, key, rows, dim))
    other = draw_projection(name, jax.random.key(2), rows, dim)
    assert dim == 1 or (np.asarray(projection) != np.asarray(other)).any()


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_same_in_x64_mode(name):
    expected = draw_projection(name, jax.random.key(0), 5, 4)
    with jax.enable_x64(True):
        projection = draw_projection(name, jax.random.key(0), 5, 4)
    assert projection.dtype == jnp.float32
    np.testing.assert_allclose(projection, expected, atol=1e-6)


@pytest.mark.parametrize("scaling", [0, 1])
def test_rows_are_orthogonal_within_blocks(scaling):
    rows, dim = 11, 4
    w = drawn(functools.partial(orthogonal_projection, num_rows=rows, dim=dim, scaling=scaling), 50)
    for start in range(0, rows, dim):
        block = w[:, start : start + dim]
        gram = block @ block.transpose(0, 2, 1)
        off = gram * (1 - np.eye(block.shape[1]))
        np.testing.assert_allclose(off, 0, atol=1e-4)
    across = np.abs(w[:, :dim] @ w[:, dim : 2 * dim].transpose(0, 2, 1)).max(axis=(1, 2))
    assert (across > 0.1).all()
    lengths = np.linalg.norm(w, axis=-1)
    if scaling:
        np.testing.assert_allclose(lengths, np.sqrt(dim), rtol=1e-5)
    else:
        assert lengths.std(axis=-1).min() > 0.05


@pytest.mark.parametrize("dim", DIMS)
def test_row_lengths_are_those_of_gaussian_vectors(dim):
    w = drawn(functools.partial(orthogonal_projection, num_rows=dim, dim=dim), 2000)
    squared = (w**2).sum(-1)
    # A chi-squared variable: mean D, variance 2 D; independent of each other.
    assert abs(squared.mean() - dim) < 4 * np.sqrt(2 * dim / squared.size)
    assert abs(squared.var() - 2 * dim) < 0.15 * 2 * dim
    if dim > 1:
        assert abs(np.corrcoef(squared[:, 0], squared[:, 1])[0, 1]) < 4 / np.sqrt(len(w))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: draw_projection("givens", key, 4, 4), "Unknown projection 'givens'"),
        (lambda key: iid_projection(key, 0, 4), "num_rows=0"),
        (lambda key: orthogonal_projection(key, 4, 0), "dim=0"),
        (lambda key: orthogonal_projection(key, 4, 4, scaling=0.5), "must be 0 .* or 1"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0))
