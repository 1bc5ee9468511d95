"""Tuned features: unbiased, of the variance the formula gives, whatever the parameters.

Fixed seeds; means within four standard errors, variances within the stated intervals.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import hyp1f1, iv, loggamma

from fast_attention.feature_maps import (
    TUNED_ESTIMATORS,
    PositiveFeatures,
    TunedFeatures,
    draw_projection,
    fold,
    tune,
    untuned,
)
from fast_attention.feature_maps.moments import measure

D, M, DRAWS, PAIRS = 8, 8, 4000, 3
UNBIASED = [name for name in TUNED_ESTIMATORS if name != "wderf_s"]
COUPLINGS = ["iid", "orthogonal", "orthogonal_antithetic", "simplex"]


@functools.cache
def data():
    """Queries and keys with means and unequal directions, as they are in trained heads."""
    rng = np.random.default_rng(0)
    scales = np.arange(1, D + 1) ** -0.7
    q, k = (
        rng.normal(size=(200, D)) * scales @ np.linalg.qr(rng.normal(size=(D, D)))[0]
        + 0.15 * rng.normal(size=D)
        for _ in "qk"
    )
    return 0.9 * q.astype(np.float32), 0.9 * k.astype(np.float32)


def moments_of(q, k):
    return jax.tree.map(lambda x: x[0], measure(jnp.asarray(q[:, None]), jnp.asarray(k[:, None])))


@functools.cache
def tuning(estimator, features=M):
    return jax.jit(tune, static_argnums=(0, 2))(estimator, moments_of(*data()), features)


@functools.cache
def rows_of(coupling):
    base = coupling.removesuffix("_antithetic")
    count = M if base == coupling else M // 2
    keys = jax.random.split(jax.random.key(8), DRAWS)
    return jax.jit(jax.vmap(lambda key: draw_projection(base, key, count, D)))(keys)


@functools.cache
def program(both_signs):
    # One program for all estimators: the tuning is an argument.
    feature_map = TunedFeatures("wderf", M, both_signs=both_signs)

    @jax.jit
    def estimates(rows, tuning, q, k):
        def one(rows):
            parameters = fold(rows, tuning)
            query, key = (
                feature_map.apply(x, parameters, is_query=is_query, exact_scale=True).shift(None)
                for x, is_query in ((q, True), (k, False))
            )
            return jnp.sum(query * key, axis=-1)

        return jax.lax.map(one, rows, batch_size=500)

    return estimates


def kernels(estimator, coupling, features=M):
    """Independent estimates of ``exp(q . k / sqrt(D))`` for a few pairs, and the pairs."""
    q, k = (x[:PAIRS] for x in data())
    found = program(coupling.endswith("antithetic"))(
        rows_of(coupling), tuning(estimator, features), q, k
    )
    x, y = q.astype(np.float64) * D**-0.25, k.astype(np.float64) * D**-0.25
    return np.asarray(found, np.float64), x, y


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("estimator", UNBIASED)
def test_unbiased(estimator, coupling):
    found, x, y = kernels(estimator, coupling)
    error = found.mean(0) / np.exp((x * y).sum(-1)) - 1
    spread = found.std(0) / np.exp((x * y).sum(-1))
    assert (spread > 1e-3).all()
    np.testing.assert_array_less(np.abs(error), 4 * spread / DRAWS**0.5)


def test_hadamard_rows_are_nearly_unbiased():
    found, x, y = kernels("favor++", "hadamard")
    np.testing.assert_allclose(found.mean(0), np.exp((x * y).sum(-1)), rtol=0.05)


def second_moment(estimator, x, y):
    """Relative second moment of one feature, and ``x~ + y~``."""
    a, b, p1, p2, stretch, _ = (np.asarray(part, np.float64) for part in tuning(estimator))
    u = (x - a * D**-0.25) @ (p1 * D**0.25).T + (y - b * D**-0.25) @ (p2 * D**0.25).T
    roots, basis = np.linalg.eigh(stretch)
    curvature, u = (1 - roots**2) / 4, u @ basis
    wide = 1 - 8 * curvature
    factors = (1 - 4 * curvature) / np.sqrt(wide) * np.exp(u**2 / wide)
    return factors.prod(-1), u


@pytest.mark.parametrize("estimator", UNBIASED)
def test_variance_of_independent_rows_is_that_of_the_formula(estimator):
    found, x, y = kernels(estimator, "iid")
    expected = (second_moment(estimator, x, y)[0] - 1) / M
    measured = found.var(0) / np.exp(2 * (x * y).sum(-1))
    np.testing.assert_allclose(measured, expected, rtol=0.25)
    assert abs((measured / expected).mean() - 1) < 0.12


def test_variance_of_orthogonal_rows_is_that_of_the_formula():
    """One block of D rows and one curvature, where there is a closed form."""
    found, x, y = kernels("favor++", "orthogonal")
    moment, u = second_moment("favor++", x, y)
    square = (u**2).sum(-1)
    cross = np.exp(-square) * hyp1f1(D, D / 2, square / 2) - 1
    expected = (moment - 1) / M + (M - 1) / M * cross
    measured = found.var(0) / np.exp(2 * (x * y).sum(-1))
    np.testing.assert_allclose(measured, expected, rtol=0.25)


def test_tuning_lowers_the_variance_as_the_family_grows():
    def mean_log(estimator):
        q, k = (part.astype(np.float64) * D**-0.25 for part in data())
        return np.log(second_moment(estimator, q, k)[0]).mean()

    chain = ["centred_favor+", "centred_favor++", "centred_sderf", "centred_aderf+"]
    logs = [mean_log(name) for name in chain]
    assert (np.diff(logs) < 0).all(), logs
    assert mean_log("favor++") > mean_log("centred_favor++")


def test_rows_of_one_length_estimate_the_regularised_kernel():
    found, x, y = kernels("centred_favor+", "orthogonal_sqrt_d")
    u = second_moment("centred_favor+", x, y)[1]
    radius, order = np.linalg.norm(u, axis=-1) * D**0.5, D / 2 - 1
    ratio = np.exp(loggamma(D / 2) - (u**2).sum(-1) / 2) * (2 / radius) ** order * iv(order, radius)
    target = ratio * np.exp((x * y).sum(-1))
    assert (ratio < 0.999).all()
    error = np.abs(found.mean(0) - target)
    np.testing.assert_array_less(error, 4 * found.std(0) / DRAWS**0.5)


@pytest.mark.parametrize("coupling", ["iid", "orthogonal_antithetic"])
def test_shrunk_features_estimate_the_shrunk_kernel(coupling):
    found, x, y = kernels("wderf_s", coupling, 8)
    a, b, p1, p2, *_ = (np.asarray(part, np.float64) for part in tuning("wderf_s", 8))
    a, b, p1, p2 = a * D**-0.25, b * D**-0.25, p1 * D**0.25, p2 * D**0.25
    log = (((x - a) @ p1.T) * ((y - b) @ p2.T)).sum(-1) + x @ b + y @ a - a @ b
    assert np.abs(log - (x * y).sum(-1)).max() > 0.01
    error = np.abs(found.mean(0) - np.exp(log))
    np.testing.assert_array_less(error, 4 * found.std(0) / DRAWS**0.5)


def test_shrinks_less_with_more_features():
    def kept(features):
        t = tuning("wderf_s", features)
        return np.asarray(t.query_norm.T @ t.key_norm)

    few, many, all_ = (np.linalg.norm(kept(n)) for n in (4, 256, 10**9))
    assert few < many < all_
    full = tuning("wderf")
    np.testing.assert_allclose(
        kept(10**9), np.asarray(full.query_norm.T @ full.key_norm), atol=2e-2 * all_
    )


def test_antithetic_features_are_those_of_rows_and_their_negatives():
    x = jnp.asarray(data()[0][:5])
    rows, full = rows_of("orthogonal_antithetic")[0], TunedFeatures("wderf", M)
    half = TunedFeatures("wderf", M // 2, both_signs=True)
    assert half.num_features(fold(rows, tuning("wderf")), D) == M
    for is_query in (True, False):
        for exact in (True, False):
            options = {"is_query": is_query, "exact_scale": exact}
            np.testing.assert_allclose(
                half.apply(x, fold(rows, tuning("wderf")), **options).log,
                full.apply(x, fold(jnp.concatenate([rows, -rows]), tuning("wderf")), **options).log,
                rtol=1e-5,
                atol=1e-5,
            )


@pytest.mark.parametrize("estimator", ["favor++", "wderf_s"])
def test_drawn_parameters_are_those_of_favor_plus(estimator):
    feature_map, plain = TunedFeatures(estimator, 8), PositiveFeatures(8)
    x = jnp.asarray(data()[0][:5])
    parameters = jax.jit(feature_map.init, static_argnums=1)(jax.random.key(0), D)
    rows = jax.jit(plain.init, static_argnums=1)(jax.random.key(0), D)
    np.testing.assert_array_equal(parameters.rows, rows)
    for is_query in (True, False):
        options = {"is_query": is_query, "exact_scale": True}
        np.testing.assert_allclose(
            feature_map.apply(x, parameters, **options).log,
            plain.apply(x, rows, **options).log,
            rtol=1e-5,
            atol=1e-5,
        )


def test_left_out_factors_are_common_to_all_features_or_to_all_keys():
    x = jnp.asarray(data()[0][:5])
    for estimator in ("favor++", "wderf_s"):
        feature_map = TunedFeatures(estimator, M)
        parameters = fold(rows_of("iid")[0], tuning(estimator))
        for is_query in (True, False):
            exact, short = (
                np.asarray(
                    feature_map.apply(x, parameters, is_query=is_query, exact_scale=exact).log
                )
                for exact in (True, False)
            )
            difference = exact - short
            first = difference[:, :1] if is_query else difference[:1, :1]
            np.testing.assert_allclose(difference, np.broadcast_to(first, exact.shape), atol=2e-5)


def test_parameters_may_differ_by_head():
    q, k = data()
    both = jax.tree.map(lambda *x: jnp.stack(x), tuning("wderf"), untuned(D))
    feature_map, rows = TunedFeatures("wderf", M), rows_of("iid")[0]
    x = jnp.asarray(np.stack([q[:6], k[:6]]))[None]
    together = feature_map.apply(x, fold(rows, both), is_query=False, exact_scale=True).log
    for head, own in enumerate((tuning("wderf"), untuned(D))):
        alone = feature_map.apply(x[0, head], fold(rows, own), is_query=False, exact_scale=True)
        np.testing.assert_allclose(together[0, head], alone.log, rtol=1e-5, atol=1e-5)


def test_a_redraw_keeps_the_tuning():
    feature_map = TunedFeatures("wderf", M)
    heads = jax.tree.map(lambda x: jnp.stack([x, x + 0.1]), tuning("wderf"))
    before = fold(rows_of("iid")[0][None], heads)
    after = jax.jit(feature_map.redraw)(jax.random.key(9), before)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert not np.allclose(before.rows, after.rows)
    for old, new in zip(before.tuning, after.tuning, strict=True):
        np.testing.assert_array_equal(old, new)
    again = fold(after.rows, heads)
    np.testing.assert_allclose(again.query_weight, after.query_weight, rtol=1e-5, atol=1e-6)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match=r"Unknown tuned estimator 'oprf'.*favor\+\+"):
        TunedFeatures("oprf")
