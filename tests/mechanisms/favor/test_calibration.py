"""Parameters from data: finite, blind to padding and to the future, better than none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.feature_maps import TUNED_ESTIMATORS, TunedParameters
from fast_attention.mechanisms.favor.calibration import calibrate
from fast_attention.mechanisms.favor.factories import ESTIMATORS
from tests.linear import cases

B, T, H, K, D, M = 2, 12, 4, 2, 8, 16
make = functools.partial(make_fast_softmax_attention, D, nb_features=M)
tuned = functools.partial(make, estimator="wderf_s", projection="orthogonal_antithetic")


@functools.cache
def inputs(scale=1.0):
    rng = np.random.default_rng(0)
    q, k, v = (
        scale * (rng.normal(size=(B, T, n, D)) + 0.5 * rng.normal(size=D)) for n in (H, K, K)
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v / scale))


@functools.cache
def calibrated(estimator="wderf_s"):
    attention = make(unidirectional=True, estimator=estimator)
    return jax.jit(functools.partial(calibrate, attention))(*inputs()[:2])


def softmax(q, k, v):
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / D**0.5)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def test_masked_is_truncated_and_rows_do_not_know_of_each_other():
    q, k, v = inputs()
    attend = jax.jit(tuned(), static_argnames="deterministic")
    lengths = [T, 7]
    mask = np.arange(T)[None] < np.asarray(lengths)[:, None]
    # Whatever lies in padding.
    wild = [jnp.where(mask[..., None, None], x, jnp.nan) for x in (q, k, v)]
    out = attend(*wild, key_mask=mask)
    for row, length in enumerate(lengths):
        alone = attend(*(x[row : row + 1, :length] for x in (q, k, v)))
        np.testing.assert_allclose(out[row : row + 1, :length], alone, rtol=1e-3, atol=1e-4)


def test_a_bias_that_masks_keys_masks_them_here_too():
    q, k, v = inputs()
    mask = np.broadcast_to(np.arange(T) < 7, (B, T))
    wild = [jnp.where(mask[..., None, None], x, 50.0) for x in (q, k, v)]
    attend = jax.jit(tuned())
    bias = jnp.where(mask, 0.0, -1e9)[:, None, None]
    np.testing.assert_allclose(
        attend(*wild, bias=bias)[:, :7], attend(*wild, key_mask=mask)[:, :7], rtol=1e-5, atol=1e-6
    )


def test_queries_of_another_sequence_have_a_mask_of_their_own():
    """Keys of equal number, of which some are padding, while all queries count."""
    q, k, v = inputs()
    mask = np.broadcast_to(np.arange(T) < 7, (B, T))
    attend = jax.jit(tuned())
    out = attend(q, k, v, key_mask=mask, query_mask=np.ones((B, T), bool))
    short = attend(q, k[:, :7], v[:, :7])
    np.testing.assert_allclose(out, short, rtol=1e-3, atol=1e-4)


def test_parameters_of_a_call_are_those_calibrated_on_it():
    q, k, v = (x[:1] for x in inputs())
    attention = tuned()
    parameters = jax.jit(functools.partial(calibrate, attention))(q, k)
    assert parameters.query_shift.shape == (K, D)
    run = jax.jit(attention)
    np.testing.assert_allclose(
        run(q, k, v, projection=parameters), run(q, k, v), rtol=1e-4, atol=1e-5
    )


def test_nothing_is_differentiated_through_the_moments():
    q, k, v = (x[:1] for x in inputs())
    attention = tuned()
    parameters = jax.jit(functools.partial(calibrate, attention))(q, k)

    def gradient(projection):
        loss = lambda *x: jnp.sum(attention(*x, projection=projection) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for got, expected in zip(gradient(None), gradient(parameters), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4)


def test_uncalibrated_causal_attention_is_plain_favor_plus():
    q, k, v = inputs()
    for estimator in ("favor++", "wderf_s"):
        attention = make(unidirectional=True, estimator=estimator)
        plain = jax.jit(make(unidirectional=True))(q, k, v)
        np.testing.assert_allclose(jax.jit(attention)(q, k, v), plain, rtol=1e-4, atol=1e-5)


def test_calibrated_causal_attention_never_knows_the_future():
    q, k, v = inputs()
    attend = jax.jit(
        functools.partial(tuned(unidirectional=True, chunk_size=4), projection=calibrated_pairs())
    )
    before = attend(q, k, v)
    late = np.arange(T)[None, :, None, None] >= 6
    for factor in (1e4, 1e-4):
        changed = (jnp.where(late, factor * x, x) for x in (q, k, v))
        np.testing.assert_array_equal(before[:, :6], attend(*changed)[:, :6])


@functools.cache
def calibrated_pairs():
    attention = tuned(unidirectional=True)
    return jax.jit(functools.partial(calibrate, attention))(*inputs()[:2])


def test_decoding_uses_the_stored_parameters():
    q, k, v = inputs()
    attention, parameters = tuned(unidirectional=True), calibrated_pairs()
    whole = jax.jit(attention)(q, k, v, projection=parameters)
    state = attention.init_state((B,), K, D, D)
    first, state = jax.jit(attention.prefill)(
        state, q[:, :8], k[:, :8], v[:, :8], projection=parameters
    )
    outs, step = [first], jax.jit(attention.step)
    for t in range(8, T):
        out, state = step(state, q[:, t], k[:, t], v[:, t], projection=parameters)
        outs.append(out[:, None])
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, rtol=1e-4, atol=1e-5)


def test_unnormalised_sums_are_at_their_true_scale():
    """Sums of many antithetic features come close to sums of exponentials."""
    q, k, v = (0.5 * x for x in inputs())
    attention = make_fast_softmax_attention(
        D, False, nb_features=4096, estimator="wderf", projection="orthogonal_antithetic"
    )
    keys, values = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    weights = jnp.exp(jnp.einsum("bthd,bshd->bhts", q, keys) / D**0.5)
    expected = jnp.einsum("bhts,bshd->bthd", weights, values)
    found = jax.jit(attention)(q, k, v)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_error_falls_as_one_over_sqrt_of_features():
    """Of an unbiased tuned estimator: a slope of -1/2 within 0.1."""
    q, k, v = inputs(0.6)
    exact = softmax(q, k, v)

    def error(features):
        attention = make_fast_softmax_attention(D, nb_features=features, estimator="wderf")
        keys = jax.random.split(jax.random.key(0), 40)
        rows = jax.random.normal(keys[0], (40, features, D))
        out = jax.jit(jax.vmap(lambda w: attention(q, k, v, projection=w)))(rows)
        return float(jnp.sqrt(jnp.mean((out - exact[None]) ** 2)))

    slope = np.log(error(512) / error(64)) / np.log(8)
    assert abs(slope + 0.5) < 0.1


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


def test_rows_of_the_layer_are_tuned_by_the_call():
    """A bidirectional function draws rows alone, as functions without parameters do."""
    attention, causal = tuned(), tuned(unidirectional=True)
    rows = attention.draw_projection(jax.random.key(0), D)
    assert rows.shape == (M // 2, D)
    assert isinstance(causal.draw_projection(jax.random.key(0), D), TunedParameters)
    q, k, v = inputs()
    other = jax.jit(attention)(q, k, v, projection=rows + 1)
    assert not np.allclose(other, jax.jit(attention)(q, k, v, projection=rows))


def test_couplings_have_their_number_of_features():
    for name, rows in {
        "iid": M,
        "orthogonal_antithetic": M // 2,
        "simplex_antithetic": M // 2,
        "hadamard": M,
    }.items():
        for estimator in ("favor+", "favor++"):
            attention = make(estimator=estimator, projection=name, unidirectional=True)
            drawn = jax.eval_shape(
                lambda key, f=attention: f.draw_projection(key, D), jax.random.key(0)
            )
            shape = (drawn.rows if isinstance(drawn, TunedParameters) else drawn).shape
            assert shape == (rows, D)
            assert attention.init_state((), K, D, D).k_sum.shape == (K, M)


def test_original_options_mean_the_new_names():
    same = [
        ({"ortho_features": False}, {"projection": "iid"}),
        ({"ortho_scaling": 1.0}, {"projection": "orthogonal_sqrt_d"}),
        ({}, {"projection": "orthogonal", "estimator": "favor+"}),
        ({"estimator": "hyperbolic"}, {"projection": "orthogonal_antithetic"}),
        ({"nonnegative_features": False}, {"estimator": "trigonometric"}),
    ]
    for old, new in same:
        assert make(**old).feature_map == make(**new).feature_map
    assert set(ESTIMATORS) > set(TUNED_ESTIMATORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "givens"}, "Unknown projection 'givens'.*simplex_antithetic"),
        ({"projection": "simplex", "ortho_features": False}, "contradicts ortho_features=False"),
        ({"projection": "orthogonal", "ortho_scaling": 1}, "which mean 'orthogonal_sqrt_d'"),
        (
            {"estimator": "trigonometric", "projection": "iid_antithetic"},
            "use 'iid' with estimator='trigonometric'",
        ),
        ({"projection": "orthogonal_antithetic", "nb_features": 5}, "must be even, got 5"),
        (
            {"estimator": "wderf_s", "calibration": "call", "unidirectional": True},
            "depend on later tokens",
        ),
        ({"calibration": "stored"}, "'favor\\+' has no parameters from data"),
        (
            {"estimator": "wderf", "calibration": "ema"},
            "'stored', 'trained' or None, got 'ema'",
        ),
        ({"estimator": "wderf", "moment_decay": 0.9}, "is for calibration='stored'"),
        (
            {"estimator": "wderf", "calibration": "stored", "moment_decay": 1.0},
            r"in \[0, 1\)",
        ),
        ({"estimator": "wderf", "nonnegative_features": False}, "only one of the two"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_fast_softmax_attention(D, **{"nb_features": M} | options)


def test_calls_that_cannot_be_honoured():
    q, k, v = inputs()
    attention = tuned()
    with pytest.raises(ValueError, match="several segments.*calibration='stored'"):
        attention(q, k, v, segment_ids=jnp.zeros((B, T), int))
    with pytest.raises(ValueError, match="depend on later tokens.*unidirectional=True"):
        attention(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match="depend on later tokens"):
        attention.prefill(attention.init_state((B,), K, D, D), q, k, v)
    with pytest.raises(ValueError, match="calibrated parameters for heads of width 8"):
        make()(q, k, v, projection=calibrated_pairs())
    with pytest.raises(ValueError, match="Only features with parameters from data"):
        calibrate(make(), q, k)
    stored = tuned(calibration="stored")
    with pytest.raises(NotImplementedError, match="TunedFeatures"):
        cases.attend(
            q,
            k,
            v,
            feature_map=stored.feature_map,
            parameters=calibrated_pairs(),
            implementation="pallas_gpu_interpret",
        )


def test_packed_segments_with_stored_parameters_are_separate_calls():
    q, k, v = inputs()
    attend = jax.jit(functools.partial(tuned(calibration="stored"), projection=calibrated_pairs()))
    ids = jnp.asarray([[0] * 5 + [1] * 7] * B)
    out = attend(q, k, v, segment_ids=ids)
    for part in (slice(5), slice(5, None)):
        alone = attend(*(x[:, part] for x in (q, k, v)))
        np.testing.assert_allclose(out[:, part], alone, rtol=1e-4, atol=1e-5)
