"""From moments to parameters: what each name promises, and data that have hardly any moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import TUNED_ESTIMATORS, tune
from fast_attention.feature_maps.gaussian_family import balance
from fast_attention.feature_maps.moments import (
    measure,
    merge_moments,
    no_moments,
    running_average,
)
from fast_attention.feature_maps.shrinkage import (
    best_curvature,
    log_second_moment,
    shrinkage,
    weighted_square,
)

D = 6


def draw(seed, *shape):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(shape[-1],) * 2)
    return (rng.normal(size=shape) @ mixing + rng.normal(size=shape[-1])).astype(np.float32)


@functools.cache
def tuned(estimator):
    return jax.jit(functools.partial(tune, estimator, num_features=32))


def test_the_curvature_is_the_best_one():
    squares = np.asarray([0, 1e-6, 1e-3, 0.3, 0.5, 2, 40, 1e4], np.float32)
    best = np.asarray(best_curvature(squares), np.float64)
    assert best[0] == 0 and (best[1:] < 0).all()
    exact = squares.astype(np.float64)
    direct = (1 - 2 * exact - np.sqrt((2 * exact + 1) ** 2 + 8 * exact)) / 16
    np.testing.assert_allclose(best, direct, rtol=1e-5, atol=1e-12)
    here = log_second_moment(exact, direct)
    for step in (0.9, 1.1):
        assert (
            np.asarray(log_second_moment(exact, direct * step)) >= np.asarray(here) - 1e-6
        ).all()


def test_balanced_moments_are_equal_and_diagonal():
    x, y = draw(0, 2, 50, D), 30 * draw(1, 2, 50, D)
    first, second = (z.swapaxes(1, 2) @ z / 50 for z in (x, y))
    p1, p2, sigma, _ = (np.asarray(z, np.float64) for z in jax.jit(balance)(first, second))
    np.testing.assert_allclose(
        p1.swapaxes(1, 2) @ p2, np.broadcast_to(np.eye(D), (2, D, D)), atol=1e-4
    )
    diagonal = sigma[..., None] * np.eye(D)
    for p, moment in ((p1, first), (p2, second)):
        np.testing.assert_allclose(p @ moment @ p.swapaxes(1, 2), diagonal, atol=2e-3 * sigma.max())


def test_shrinkage_is_the_minimum():
    """Of variance and squared bias together, against a random search."""
    sigma, features = np.asarray([3.0, 1.0, 0.4, 0.05]), 64

    def cost(c):
        square = np.asarray(weighted_square(c * sigma))
        moment = log_second_moment(square, best_curvature(square)).sum(-1)
        return np.expm1(moment) / features + 2 * ((1 - c) ** 2 * sigma**2).sum(-1)

    found = np.asarray(
        jax.jit(shrinkage, static_argnums=1)(jnp.asarray(sigma, jnp.float32), features)
    )
    assert (found >= 0).all() and (found <= 1).all() and (np.diff(found) < 0).all()
    rng = np.random.default_rng(0)
    others = np.clip(
        found + rng.normal(scale=[[0.1], [0.01]], size=(500, 2, 1)) * rng.normal(size=(500, 2, 4)),
        0,
        1,
    )
    assert cost(found) <= cost(others).min() * (1 + 1e-4)


def test_moments_are_means_and_covariances_of_visible_positions():
    q, k = draw(0, 2, 9, 4, D), draw(1, 2, 7, 2, D)
    query_mask = np.arange(9)[None] < np.asarray([[9], [4]])
    key_mask = np.arange(7)[None] >= np.asarray([[0], [3]])
    q[~query_mask], k[~key_mask] = np.nan, np.inf
    masks = {"query_mask": query_mask[..., None], "key_mask": key_mask[..., None]}
    found = jax.jit(measure)(q, k, **masks)
    pooled = jax.jit(functools.partial(measure, pooled=True))(q, k, **masks)
    for head in range(2):
        group = q[:, :, 2 * head : 2 * head + 2]
        for side, x, mask in (("query", group, query_mask), ("key", k[:, :, head, None], key_mask)):
            rows = [x[b][mask[b]].reshape(-1, D).astype(np.float64) for b in range(2)]
            for own, part in [
                *((getattr(found, side), b) for b in range(2)),
                (getattr(pooled, side), None),
            ]:
                z = np.concatenate(rows) if part is None else rows[part]
                place = (head,) if part is None else (part, head)
                assert own.weight[place] == len(z)
                np.testing.assert_allclose(own.mean[place], z.mean(0), rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(
                    own.covariance[place], np.cov(z.T, bias=True), rtol=1e-4, atol=1e-4
                )


def test_merged_moments_are_those_of_all_together():
    q, k = draw(0, 1, 20, 1, D), draw(1, 1, 20, 1, D)
    pooled = functools.partial(measure, pooled=True)
    halves = [pooled(q[:, s], k[:, s]) for s in (slice(7), slice(7, None))]
    merged, whole = merge_moments(*halves), pooled(q, k)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), merged, whole)


def test_a_running_average_starts_without_bias_and_skips_what_it_did_not_see():
    q, k = draw(0, 1, 20, 1, D), draw(1, 1, 20, 1, D)
    new = measure(q, k, pooled=True)
    first = running_average(no_moments(1, D), new, 0.9)
    np.testing.assert_allclose(first.key.mean, new.key.mean, rtol=1e-6)
    np.testing.assert_allclose(first.key.covariance, new.key.covariance, rtol=1e-5)
    unseen = measure(q, k, query_mask=np.zeros((1, 20, 1), bool), pooled=True)
    after = running_average(first, unseen, 0.9)
    np.testing.assert_allclose(after.query.mean, first.query.mean, rtol=1e-6)
    twice = running_average(first, measure(q + 1, k, pooled=True), 0.9)
    # Weights 0.09 and 0.1.
    expected = first.query.mean + 0.1 / 0.19
    np.testing.assert_allclose(twice.query.mean, expected, rtol=1e-5)


DEGENERATE = {
    "equal keys": lambda q, k: (q, np.broadcast_to(k[:1], k.shape)),
    "equal queries": lambda q, k: (np.broadcast_to(q[:1], q.shape), k),
    "one position": lambda q, k: (q[:1], k[:1]),
    "zeros": lambda q, k: (0 * q, 0 * k),
    "one direction": lambda q, k: (q * np.eye(q.shape[-1])[0], k * np.eye(q.shape[-1])[0]),
    "huge": lambda q, k: (1e4 * q, 1e4 * k),
    "huge and tiny": lambda q, k: (1e6 * q, 1e-6 * k),
}


@pytest.mark.parametrize("estimator", TUNED_ESTIMATORS)
def test_parameters_are_finite_whatever_the_data(estimator):
    moments = []
    for change in DEGENERATE.values():
        q, k = (x.astype(np.float32) for x in change(draw(0, 20, D), draw(1, 20, D)))
        moments.append(jax.tree.map(lambda x: x[0], measure(q[:, None], k[:, None])))
    moments.append(jax.tree.map(lambda x: x[0], no_moments(1, D)))
    together = jax.tree.map(lambda *x: jnp.stack(x), *moments)
    found = tuned(estimator)(together)
    for name, x in found._asdict().items():
        assert np.isfinite(x).all(), name
    assert (np.asarray(found.log_stretch) >= -1e-6).all()
    if estimator != "wderf_s":
        # Unbiased, therefore, for all of them.
        unit = found.query_norm.swapaxes(1, 2) @ found.key_norm * D**0.5
        np.testing.assert_allclose(unit, np.broadcast_to(np.eye(D), unit.shape), atol=2e-3)


@pytest.mark.parametrize("estimator", ["sderf", "aderf+", "wderf_s"])
def test_parameters_depend_smoothly_on_the_data(estimator):
    """Eigenvectors of equal eigenvalues, and all signs, are a matter of rounding."""
    q, k = draw(0, 200, D), draw(1, 200, D)
    moments = measure(q[:, None], k[:, None])
    round_ones = jax.tree.map(jnp.zeros_like, moments)
    eye = jnp.eye(D)[None]
    round_ones = round_ones._replace(
        query=round_ones.query._replace(covariance=eye), key=round_ones.key._replace(covariance=eye)
    )
    for start in (moments, round_ones):
        nudge = 1e-5 * draw(2, D, D)
        moved = start._replace(
            query=start.query._replace(covariance=start.query.covariance + (nudge + nudge.T)[None])
        )
        for old, new in zip(tuned(estimator)(start), tuned(estimator)(moved), strict=True):
            np.testing.assert_allclose(old, new, rtol=1e-3, atol=1e-3 * np.abs(old).max())


@pytest.mark.parametrize("estimator", ["saderf", "centred_aderf+", "wderf_s"])
def test_heads_of_width_one(estimator):
    q, k = draw(0, 20, 1), draw(1, 20, 1)
    found = tuned(estimator)(measure(q[:, None], k[:, None]))
    assert all(np.isfinite(x).all() for x in found)
