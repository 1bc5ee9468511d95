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
from tests.mechanisms.favor.calibration_cases import (
    B,
    D,
    H,
    K,
    M,
    T,
    calibrated_pairs,
    inputs,
    make,
    softmax,
    tuned,
)


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
