"""Whatever numbers training makes of the parameters: admissible, unbiased, differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.feature_maps import (
    TrainedParameters,
    TunedFeatures,
    begin_training,
    fold_trained,
    untuned,
)
from fast_attention.mechanisms.favor.calibration import calibrate

B, T, H, K, D, M = 2, 7, 4, 2, 4, 8
make = functools.partial(
    make_fast_softmax_attention,
    D,
    nb_features=M,
    calibration="trained",
    projection="orthogonal_antithetic",
    unidirectional=True,
    chunk_size=3,
)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(B, T, n, D)) + 0.5 * rng.normal(size=D) for n in (H, K, K))


def disturbed(estimator, size=0.3, seed=3):
    """Parameters that no data suggested, of each key head."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.asarray(size * rng.normal(size=(K, *shape)), np.float32)  # noqa: E731
    shapes = [(D,), (D,), *[(D * (D + 1) // 2,)] * 3]
    rows = rng.normal(size=(1, M // 2, D)).astype(np.float32)
    parameters = TrainedParameters(rows, *(draw(*shape) for shape in shapes))
    return parameters if estimator == "wderf_s" else parameters._replace(keep=None)


def test_zeros_are_plain_favor_plus():
    plain = untuned(D)
    rows = np.random.default_rng(0).normal(size=(M, D)).astype(np.float32)
    for estimator in ("wderf", "wderf_s"):
        start = jax.jit(begin_training, static_argnums=2)(rows, plain, estimator)
        assert all(np.allclose(x, 0, atol=2e-5) for x in jax.tree.leaves(start._replace(rows=None)))
        for x, y in zip(fold(start).tuning, plain, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


def test_any_numbers_are_admissible():
    for scale in (1.0, 3.0):
        folded = fold(disturbed("wderf", scale))
        eye = np.broadcast_to(np.eye(D), (K, D, D))
        both = np.swapaxes(folded.query_norm, -1, -2) @ folded.key_norm * D**0.5
        np.testing.assert_allclose(both, eye, atol=2e-2)
        square = np.swapaxes(folded.stretch, -1, -2) @ folded.stretch
        # The second moment of a feature is finite.
        assert np.linalg.eigvalsh(square).min() > 0.5
        np.testing.assert_allclose(
            folded.log_stretch, np.linalg.slogdet(folded.stretch)[1], rtol=1e-4
        )


def test_unbiased_whatever_is_learned():
    """The mean of many draws is exp(x . y) within 4 standard errors, for each head and pair."""
    parameters = disturbed("wderf")
    feature_map = TunedFeatures("wderf", M, "iid", trained=True)
    draws = 20_000
    rows = jax.random.normal(jax.random.key(1), (draws, 1, M, D))
    rng = np.random.default_rng(5)
    q, k = (0.7 * rng.normal(size=(K, 3, D)).astype(np.float32) for _ in range(2))

    @jax.jit
    @jax.vmap
    def kernel(rows):
        folded = fold_trained(parameters._replace(rows=rows))
        left, right = (
            feature_map.apply(x, folded, is_query=is_query, exact_scale=True).shift(None)
            for x, is_query in ((q, True), (k, False))
        )
        return jnp.einsum("ktm,ksm->kts", left, right)

    found = np.asarray(kernel(rows), np.float64)
    expected = np.exp(np.einsum("ktd,ksd->kts", q, k) / D**0.5)
    error = found.std(axis=0) / draws**0.5
    assert (np.abs(found.mean(axis=0) - expected) < 4 * error).all()
    assert (error < 0.05 * expected).all()


def test_gradients_are_those_of_finite_differences():
    """Beside an exact window, too, whose features are at their true scale."""
    with jax.enable_x64(True):
        attention = make(estimator="wderf_s", exact_window=2)
        wide = lambda x: jnp.asarray(np.asarray(x), jnp.float64)  # noqa: E731
        parameters = jax.tree.map(wide, disturbed("wderf_s"))
        arrays = [wide(x) for x in inputs()]
        weights = jax.random.normal(jax.random.key(2), (B, T, H, D), jnp.float64)

        @jax.jit
        def loss(parameters):
            return jnp.sum(weights * attention(*arrays, projection=parameters))

        gradient = jax.jit(jax.grad(loss))(parameters)
        assert not np.asarray(gradient.rows).any()
        rng = np.random.default_rng(1)
        for name in TrainedParameters._fields[1:]:
            x = getattr(parameters, name)
            way = rng.normal(size=x.shape)
            sides = (loss(parameters._replace(**{name: x + s * 1e-5 * way})) for s in (1, -1))
            slope = (next(sides) - next(sides)) / 2e-5
            found = np.sum(getattr(gradient, name) * way)
            assert abs(found) > 1e-3
            np.testing.assert_allclose(found, slope, rtol=1e-6)


def test_finite_in_half_precision():
    attention = make(estimator="wderf_s")
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), disturbed("wderf_s"))

    @jax.jit
    def run(*arrays):
        loss = lambda p, *x: jnp.sum(attention(*x, projection=p).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2, 3))(parameters, *arrays)

    three = [np.concatenate([scale * x[:1] for scale in (0, 1, 30)]) for x in inputs()]
    found = run(*(jnp.asarray(x, jnp.bfloat16) for x in three))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found))


def test_what_calibration_finds_is_where_training_begins():
    """The same kernel, and rows turned by the same amount for queries and keys."""
    rng = np.random.default_rng(2)
    spread = np.diag([3.0, 1.0, 0.5, 0.1])
    q, k = (
        (rng.normal(size=(B, 40, n, D)) @ spread + rng.normal(size=D)).astype(np.float32)
        for n in (H, K)
    )
    for estimator in ("wderf", "wderf_s"):
        functions = make(estimator=estimator, calibration="stored"), make(estimator=estimator)
        stored, trained = jax.jit(lambda q, k, f=functions: [calibrate(a, q, k) for a in f])(q, k)
        stored = jax.tree.map(np.asarray, stored)
        assert isinstance(trained, TrainedParameters)
        folded = fold(trained)
        np.testing.assert_array_equal(folded.query_shift, stored.query_shift)
        for left, right in (
            ("query_norm", "key_norm"),
            ("query_norm", "query_norm"),
            ("key_norm", "key_norm"),
            ("long", "long"),
        ):
            one, other = (
                np.swapaxes(part(p, left), -1, -2) @ part(p, right) for p in (stored, folded)
            )
            np.testing.assert_allclose(one, other, atol=1e-2 * np.abs(one).max())


def fold(parameters):
    return jax.tree.map(np.asarray, jax.jit(fold_trained)(parameters))


def part(parameters, name):
    if name == "long":
        return parameters.stretch @ parameters.query_norm
    return getattr(parameters, name)


def test_decoding_equals_the_call_and_the_future_is_unknown():
    attention = make(estimator="wderf_s")
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), disturbed("wderf_s"))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs())
    call = jax.jit(attention)
    whole = call(q, k, v, projection=parameters)
    state = attention.init_state((B,), K, D, D)
    first, state = jax.jit(attention.prefill)(
        state, q[:, :-1], k[:, :-1], v[:, :-1], projection=parameters
    )
    last, _ = jax.jit(attention.step)(state, q[:, -1], k[:, -1], v[:, -1], projection=parameters)
    np.testing.assert_allclose(
        jnp.concatenate([first, last[:, None]], 1), whole, rtol=1e-4, atol=1e-5
    )
    late = np.arange(T)[None, :, None, None] >= 4
    changed = call(*(jnp.where(late, 1e3 * x, x) for x in (q, k, v)), projection=parameters)
    np.testing.assert_array_equal(changed[:, :4], whole[:, :4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "favor++"}, "the estimators wderf and wderf_s include this family"),
        ({"estimator": "favor+"}, "has no parameters from data"),
        ({"estimator": "wderf", "moment_decay": 0.9}, "is for calibration='stored'"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_trained_parameters_are_for_functions_that_train():
    q, k, v = inputs()
    parameters = disturbed("wderf")
    for other in (make(estimator="wderf", calibration="stored"), make_fast_softmax_attention(D)):
        with pytest.raises(ValueError, match=r"trained parameters for heads.*draw_projection"):
            other(q, k, v, projection=parameters)
    # Along a mesh axis, they are the same on all devices.
    assert make(estimator="wderf").along_axis("sequence").calibration == "trained"
