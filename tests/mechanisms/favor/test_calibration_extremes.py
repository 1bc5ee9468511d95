"""Calibrated features of extreme queries and keys: large norms, few positions, degenerate calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.mechanisms.favor.calibration import calibrate
from tests.mechanisms.favor.calibration_cases import (
    B,
    D,
    K,
    T,
    calibrated,
    calibrated_pairs,
    inputs,
    make,
    softmax,
    tuned,
)

EXTREMES = ["big", "opposed", "aligned", "tiny"]


def extreme(name):
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(B, T, 2, D)) for _ in range(3))
    norm = (200 * D**0.5) ** 0.5 if name != "tiny" else 1e-3
    q, k = (x * norm / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q = {"opposed": -k, "aligned": k}.get(name, q)
    return q, k, v


@pytest.mark.parametrize("estimator", ["saderf", "sderf", "wderf_s"])
def test_squared_norms_of_200_stay_finite(estimator):
    """float32 and bfloat16, parameters of the very data, and of other data causally."""
    four = [np.stack(x) for x in zip(*(extreme(name) for name in EXTREMES), strict=True)]
    causal = make(unidirectional=True, estimator=estimator, chunk_size=4)
    both = make(estimator=estimator)
    ordinary = calibrated(estimator)

    def run(q, k, v):
        loss = lambda f: lambda *x: jnp.sum(f(*x).astype(jnp.float32) ** 2)  # noqa: E731
        stored = functools.partial(causal, projection=ordinary)
        return [(f(q, k, v), jax.grad(loss(f), argnums=(0, 1, 2))(q, k, v)) for f in (both, stored)]

    run = jax.jit(run)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = run(*(jnp.asarray(x, dtype) for x in four))
        for x in jax.tree.leaves(found):
            assert x.dtype == dtype
            assert np.isfinite(np.asarray(x, np.float32)).all()
        for out, _ in found:
            largest = np.abs(four[2]).max()
            assert np.abs(np.asarray(out, np.float32)).max() <= 1.02 * largest


def dense(parameters, q, k, v):
    """Attention by features of these parameters in float64, all keys at once; one head."""
    p = {name: np.asarray(x, np.float64)[0] for name, x in parameters._asdict().items()}
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    shifted = k - p["key_shift"]
    log_q = (q - p["query_shift"]) @ p["query_weight"].T + p["bias"]
    log_k = shifted @ p["key_weight"].T + p["bias"]
    log_k += (shifted @ p["query_shift"] * q.shape[-1] ** -0.5)[:, None]
    log_k -= 0.5 * np.sum((shifted @ p["key_norm"].T) ** 2, -1, keepdims=True)
    exponents = log_q[:, None] + log_k[None]
    weights = np.exp(exponents - exponents.max((1, 2), keepdims=True)).sum(-1)
    return (weights @ v / weights.sum(-1, keepdims=True))[None, :, None]


FEW = {
    "few": lambda x: x,
    "one large": lambda x: x * np.where(np.arange(len(x)) == 0, 1, 1e-2)[:, None],
    "large mean": lambda x: x + 20,
    "equal": lambda x: np.broadcast_to(x[:1], x.shape),
}


@pytest.mark.parametrize("estimator", ["aderf+", "wderf", "wderf_s"])
def test_fewer_positions_than_channels_at_any_norm(estimator):
    """Their covariances have no inverse; right to rounding, from tiny to huge squared norms."""
    width, length = 32, 9
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, length, width))
    attend = make_fast_softmax_attention(
        width, nb_features=16, estimator=estimator, redraw_features=False
    )

    @jax.jit
    def run(q, k, v):
        loss = lambda *x: (jnp.sum((out := attend(*x)) * v), out)  # noqa: E731
        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, grads, calibrate(attend, q, k)

    for name, change in FEW.items():
        for square in (1e-3, 30, 2000):
            norm = (square * width**0.5) ** 0.5
            sides = [norm * x / np.linalg.norm(x, axis=-1).max() for x in (change(q), change(k))]
            three = [jnp.asarray(x, jnp.float32)[None, :, None] for x in (*sides, v)]
            out, grads, parameters = run(*three)
            assert all(np.isfinite(x).all() for x in (out, *grads)), (name, square)
            exact = dense(parameters, *three)
            # Exponents of the size of the squared norm are rounded.
            np.testing.assert_allclose(out, exact, atol=1e-5 + 2e-5 * square, err_msg=name)


def test_denominators_are_at_least_one():
    from fast_attention.linear.chunked import api as chunked
    from fast_attention.linear.state import empty_state
    from fast_attention.linear.types import Inputs, Plan

    attention, parameters = tuned(unidirectional=True), calibrated_pairs()
    feature_map = attention.feature_map

    @functools.partial(jax.jit, static_argnames="causal")
    def denominators(q, k, v, causal):
        plan = Plan(feature_map=feature_map, causal=causal, output="parts", chunk_size=4)
        state = empty_state(feature_map, parameters, (B,), K, D, D)
        parts, _ = chunked.attend(plan, Inputs(q, k, v, parameters, None, None, None, state))
        return parts.denominator

    for name in EXTREMES:
        arrays = [x.astype(np.float32) for x in extreme(name)]
        for causal in (True, False):
            assert np.asarray(denominators(*arrays, causal=causal)).min() >= 1 - 1e-4


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, 0 * k + 1, v),
        lambda q, k, v: (0 * q, 0 * k, v),
        lambda q, k, v: (q[:, :1], k[:, :1], v[:, :1]),
    ],
    ids=["equal keys", "zeros", "one token"],
)
def test_degenerate_calls(change):
    q, k, v = change(*inputs())
    for estimator in ("wderf_s",):
        attend = make(estimator=estimator)
        loss = lambda *x, f=attend: jnp.sum(f(*x) ** 2)  # noqa: E731
        out = jax.jit(attend)(q, k, v)
        # Keys that do not differ have equal weights, whatever is drawn.
        np.testing.assert_allclose(out, softmax(q, k, v), rtol=1e-3, atol=1e-3)
        grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
        assert all(np.isfinite(x).all() for x in grads)


def test_a_row_without_keys_is_zero():
    q, k, v = inputs()
    mask = np.asarray([[True] * T, [False] * T])
    attend = tuned()
    loss = lambda *x: jnp.sum(attend(*x, key_mask=mask) ** 2)  # noqa: E731
    out = jax.jit(attend)(q, k, v, key_mask=mask)
    assert np.isfinite(out).all() and not np.asarray(out[1]).any()
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() and not np.asarray(x[1]).any() for x in grads)
