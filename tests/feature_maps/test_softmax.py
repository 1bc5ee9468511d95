"""Random features of the softmax kernel: unbiased, of known variance, better with more of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import (
    HyperbolicFeatures,
    PositiveFeatures,
    TrigonometricFeatures,
)

MAPS = [PositiveFeatures, HyperbolicFeatures, TrigonometricFeatures]
DRAWS = 4000


def kernels(feature_map, x, y, draws=DRAWS, seed=0):
    """Returns independent estimates of ``exp(x . y / sqrt(D))``."""

    def estimate(key):
        w = feature_map.init(key, x.shape[-1])
        query, key = (
            feature_map.apply(z[None], w, is_query=is_query, exact_scale=True).shift(None)
            for z, is_query in ((x, True), (y, False))
        )
        return jnp.sum(query * key)

    keys = jax.random.split(jax.random.key(seed), draws)
    return np.asarray(jax.jit(jax.vmap(estimate))(keys), np.float64)


@pytest.mark.parametrize(
    ("make", "dim"),
    [*((PositiveFeatures, dim) for dim in (1, 2, 8, 16)), *((make, 4) for make in MAPS)],
)
def test_unbiased_along_the_first_axis(make, dim):
    """Without the signs of R in the QR decomposition the first axis is the one that is wrong."""
    x = jnp.zeros(dim).at[0].set(0.8 * dim**0.25)
    y = jnp.zeros(dim).at[0].set(0.9 * dim**0.25)
    estimates = kernels(make(dim + 1), x, y)
    error = estimates.mean() - np.exp(0.72)
    assert abs(error) < 4 * estimates.std() / np.sqrt(DRAWS)
    assert estimates.std() > 1e-3


@pytest.mark.parametrize("make", MAPS)
def test_variance_is_that_of_the_formula(make):
    """Relative variances of independent rows, arXiv:2009.14794, lemma 2."""
    dim, rows = 4, 8
    x, y = jnp.asarray([0.5, 0.2, -0.4, 0.1]), jnp.asarray([0.3, -0.2, 0.1, 0.6])
    x, y = x * 4**0.25, y * 4**0.25
    both, difference = np.sum((x + y) ** 2) / 2, np.sum((x - y) ** 2) / 2
    expected = {
        PositiveFeatures: (np.exp(both) - 1) / rows,
        HyperbolicFeatures: (1 - np.exp(-both)) * (np.exp(both) - 1) / (2 * rows),
        TrigonometricFeatures: np.exp(difference) * (1 - np.exp(-difference)) ** 2 / (2 * rows),
    }[make]
    estimates = kernels(make(rows, "iid"), x, y, draws=20000)
    exact = float(np.exp(x @ y / dim**0.5))
    np.testing.assert_allclose(estimates.var() / exact**2, expected, rtol=0.1)


def test_orthogonal_rows_have_smaller_variance():
    x = jnp.full(16, 0.25)
    iid, orthogonal = (
        kernels(PositiveFeatures(16, name), x, x, draws=8000).var()
        for name in ("iid", "orthogonal")
    )
    assert orthogonal < 0.9 * iid


def test_error_of_attention_falls_as_one_over_sqrt_of_features():
    dim, length, draws = 8, 16, 50
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(scale=0.4, size=(length, dim)), jnp.float32) for _ in "qk")
    v = jnp.asarray(rng.normal(size=(length, 3)), jnp.float32)
    exact = jax.nn.softmax(q @ k.T / dim**0.5) @ v

    def error(rows):
        feature_map = PositiveFeatures(rows)

        def attend(key):
            w = feature_map.init(key, dim)
            query, key = (
                feature_map.apply(z, w, is_query=is_query, exact_scale=True).shift(None)
                for z, is_query in ((q, True), (k, False))
            )
            weights = query @ key.T
            return jnp.sqrt(jnp.mean((weights @ v / weights.sum(-1, keepdims=True) - exact) ** 2))

        return jax.jit(jax.vmap(attend))(jax.random.split(jax.random.key(0), draws)).mean()

    errors = np.asarray([error(rows) for rows in (64, 256)])
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.2)


@pytest.mark.parametrize("make", MAPS)
def test_left_out_factors_are_common_to_all_features(make):
    feature_map = make(8)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    w = feature_map.init(jax.random.key(0), 4)
    assert feature_map.num_features(w, 4) == (8 if make is PositiveFeatures else 16)
    for is_query in (True, False):
        exact, short = (
            feature_map.apply(x, w, is_query=is_query, exact_scale=exact).shift(None)
            for exact in (True, False)
        )
        ratio = np.asarray(exact / short)
        per_position = ratio if is_query else ratio / ratio[0, 0]
        common = np.broadcast_to(per_position[:, :1], ratio.shape)
        np.testing.assert_allclose(per_position, common, rtol=1e-5)
        if not is_query:
            # Keys may lose a factor common to all of them, never one of their own.
            np.testing.assert_allclose(common, 1, rtol=1e-5)


def test_parameters_may_differ_by_head():
    feature_map = PositiveFeatures(8)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 5, 4)), jnp.float32)
    w = jax.vmap(lambda key: feature_map.init(key, 4))(jax.random.split(jax.random.key(0), 3))
    together = feature_map.apply(x, w, is_query=False, exact_scale=True).log
    for head in range(3):
        alone = feature_map.apply(x[:, head], w[head], is_query=False, exact_scale=True).log
        np.testing.assert_allclose(together[:, head], alone, rtol=1e-5, atol=1e-6)
