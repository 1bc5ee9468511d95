"""Learned features against their definition in float64: values, gradients, states, windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.feature_maps import DarkformerParameters, HedgehogParameters

B, T, H, K, D, V = 2, 11, 4, 2, 5, 3
LEARNED = pytest.mark.parametrize("estimator", ["hedgehog", "darkformer"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
VISIBLE = np.arange(T)[None] < np.array([[T], [T - 4]])
make = functools.partial(make_fast_softmax_attention, nb_features=6, chunk_size=4)


@functools.cache
def arrays(scale=1.0):
    rng = np.random.default_rng(0)
    widths = ((H, D), (K, D), (K, V))
    return tuple(scale * rng.normal(size=(B, T, *sizes)) for sizes in widths)


@functools.cache
def moved(estimator, window=None):
    """Parameters of each key head, away from the start."""
    function = make(estimator=estimator, exact_window=window)
    start = function.draw_projection(jax.random.key(1), D)
    rng = np.random.default_rng(3)
    parts = {
        name: np.asarray(x)
        if name == "rows"
        else np.asarray(x) + 0.4 * rng.normal(size=(K, *x.shape))
        for name, x in start._asdict().items()
        if x is not None
    }
    return type(start)(**{name: np.asarray(x, np.float64) for name, x in parts.items()})


def logsumexp(x, axis):
    most = x.max(axis=axis, keepdims=True)
    return most + jnp.log(jnp.exp(x - most).sum(axis=axis, keepdims=True))


def hedgehog(x, weight):
    """``[B, T, D]`` to logarithms of features, by the words of the paper."""
    u = jnp.concatenate([x @ weight.T, -x @ weight.T], axis=-1)
    return u - logsumexp(u, -1)


def darkformer(x, p):
    z = x @ p.matrix.T * D**-0.25
    rows = jax.lax.stop_gradient(p.rows)
    return z @ rows.T - 0.5 * (z * z).sum(-1, keepdims=True) - 0.5 * np.log(len(rows))


def definition(query, key, value, p, causal, visible=VISIBLE, window=None):
    """``[B, T, H, V]``: a matrix of weights for each head."""
    out = []
    for head in range(H):
        kv = head // (H // K)
        own = jax.tree.map(lambda x, kv=kv: x[kv] if x.ndim > 2 or x.shape == (K,) else x, p)
        q, k = query[..., head, :], key[..., kv, :]
        if isinstance(p, HedgehogParameters):
            left, right = hedgehog(q, own.query_weight), hedgehog(k, own.key_weight)
        else:
            left, right = darkformer(q, own), darkformer(k, own)
        logs = logsumexp(left[:, :, None] + right[:, None], -1)[..., 0]
        if window is not None:
            if isinstance(p, HedgehogParameters):
                logs = logs + own.log_scale
            away = np.arange(T)[None, :, None] - np.arange(T)
            near = away < window if causal else abs(away) <= window
            logs = jnp.where(near, jnp.einsum("btd,bsd->bts", q, k) * D**-0.5, logs)
        seen = visible[:, None] & (np.tri(T, dtype=bool) if causal else True)
        logs = jnp.where(jnp.asarray(seen), logs, -1e30)
        weights = jnp.exp(logs - jax.lax.stop_gradient(logs.max(-1, keepdims=True)))
        weights = weights / weights.sum(-1, keepdims=True)
        out.append(weights @ value[..., kv, :])
    return jnp.stack(out, axis=-2)


@functools.cache
def expected(estimator, causal, window):
    with jax.enable_x64(True):
        inputs = *map(jnp.asarray, arrays()), jax.tree.map(jnp.asarray, moved(estimator, window))
        told = {"causal": causal, "window": window}
        found = values_and_gradients(lambda *x: definition(*x, **told), *inputs)
        return jax.tree.map(np.asarray, found)


def values_and_gradients(function, *inputs):
    weights = np.random.default_rng(5).normal(size=(B, T, H, V)) * VISIBLE[..., None, None]

    def loss(*inputs):
        out = function(*inputs)
        return jnp.sum(weights * out), out

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    (_, out), gradients = jax.jit(grad)(*inputs)
    return out * VISIBLE[..., None, None], gradients


@LEARNED
@CAUSAL
@pytest.mark.parametrize(
    "options", [{}, {"exact_window": 3}, {"implementation": "reference"}], ids=str
)
def test_values_and_gradients_are_those_of_the_definition(estimator, causal, options):
    window = options.get("exact_window")
    function = make(estimator=estimator, unidirectional=causal, **options)
    with jax.enable_x64(True):
        inputs = (*map(jnp.asarray, arrays()), jax.tree.map(jnp.asarray, moved(estimator, window)))
        found = values_and_gradients(
            lambda q, k, v, p: function(q, k, v, key_mask=VISIBLE, projection=p), *inputs
        )
        target = expected(estimator, causal, window)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10)
        learned = [x for name, x in target[1][3]._asdict().items() if name != "rows"]
        assert all(x is None or abs(x).max() > 1e-3 for x in learned)


@LEARNED
@CAUSAL
def test_half_precision_and_long_vectors(estimator, causal):
    """bfloat16 inputs err by their own rounding; large vectors give finite results and slopes."""
    function = make(estimator=estimator, unidirectional=causal)
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), moved(estimator))
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in half]
        exact = definition(*wide, moved(estimator), causal=causal)
        exact = np.asarray(exact) * VISIBLE[..., None, None]
    run = jax.jit(lambda q, k, v, p: function(q, k, v, key_mask=VISIBLE, projection=p))
    found = np.asarray(run(*half, parameters), np.float64) * VISIBLE[..., None, None]
    np.testing.assert_allclose(found, exact, atol=0.03)
    far = [jnp.asarray(60 * x, jnp.float32) for x in arrays()]
    out, slopes = values_and_gradients(run, *far, parameters)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, slopes)))


@LEARNED
@pytest.mark.parametrize("window", [None, 3], ids=["far", "window"])
def test_a_prompt_and_steps_are_the_whole(estimator, window):
    function = make(estimator=estimator, unidirectional=True, exact_window=window)
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), moved(estimator, window))
    query, key, value = (jnp.asarray(x, jnp.float32) for x in arrays())
    whole = jax.jit(function)(query, key, value, projection=parameters)
    state = function.init_state((B,), K, D, V)
    split = 6
    out, state = function.prefill(
        state, *(x[:, :split] for x in (query, key, value)), projection=parameters
    )
    parts = [out]
    step = jax.jit(functools.partial(function.step, projection=parameters))
    for t in range(split, T):
        out, state = step(state, query[:, t], key[:, t], value[:, t])
        parts.append(out[:, None])
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", ["orthogonal", "orthogonal_antithetic", "iid"])
def test_darkformer_begins_as_favor_plus(projection):
    options = {"projection": projection, "exact_window": 2, "redraw_features": True, "seed": 4}
    ours, plain = (make(estimator=name, **options) for name in ("darkformer", "favor+"))
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays()]
    key = {"dropout_rng": jax.random.key(2)}
    for told in ({}, key | {"deterministic": True}, key):
        np.testing.assert_allclose(
            ours(*inputs, **told), plain(*inputs, **told), rtol=2e-5, atol=2e-6
        )
    rows = plain.draw_projection(jax.random.key(3), D)
    found = ours(*inputs, projection=rows)
    np.testing.assert_allclose(found, plain(*inputs, projection=rows), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("features", [4, 2 * D, 2 * D + 6])
def test_hedgehog_begins_as_the_identity(features):
    """Rows beyond the head width are orthonormal and no copies; nothing is drawn in training."""
    function = make(nb_features=features, estimator="hedgehog")
    weight = np.asarray(function.draw_projection(jax.random.key(1), D).key_weight)
    assert weight.shape == (features // 2, D)
    np.testing.assert_array_equal(weight[:D], np.eye(D)[: features // 2])
    rest = weight[D:]
    np.testing.assert_allclose(rest @ rest.T, np.eye(len(rest)), atol=1e-5)
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays()]
    plain = function(*inputs)
    np.testing.assert_array_equal(function(*inputs, dropout_rng=jax.random.key(5)), plain)


def test_beside_a_window_equal_features_weigh_as_much_as_a_logit_of_zero():
    function = make(estimator="hedgehog", exact_window=2)
    _, _, value = (jnp.asarray(x, jnp.float32) for x in arrays())
    query, key = jnp.zeros((B, T, H, D)), jnp.zeros((B, T, K, D))
    mean = jnp.broadcast_to(value.mean(axis=1, keepdims=True), value.shape)
    mean = jnp.repeat(mean, H // K, axis=2)
    np.testing.assert_allclose(function(query, key, value), mean, rtol=1e-5, atol=1e-6)


def test_new_rows_leave_the_matrix():
    function = make(estimator="darkformer")
    start = function.draw_projection(jax.random.key(1), D)
    mine = start._replace(rows=start.rows[None], matrix=jnp.full((K, D, D), 2.0))
    found = function.redraw_projection(jax.random.key(2), mine)
    assert isinstance(found, DarkformerParameters)
    np.testing.assert_array_equal(found.matrix, mine.matrix)
    assert found.rows.shape == mine.rows.shape and not np.allclose(found.rows, mine.rows)


def test_what_does_not_fit_is_refused():
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays()]
    learned = make(estimator="hedgehog")
    own = learned.draw_projection(jax.random.key(0), D)
    cases = [
        (make(estimator="hedgehog"), jnp.ones((6, D)), "has no random projection, got an array"),
        (make(estimator="darkformer"), own, "DarkformerParameters for heads of width 5.*Hedgehog"),
        (learned, learned.draw_projection(jax.random.key(0), D + 1), "got one for width 6"),
        (make(estimator="favor+"), own, "holds HedgehogParameters, but.*PositiveFeatures"),
        (make(estimator="wderf_s"), own, "holds HedgehogParameters, but.*TunedFeatures"),
        (make_fast_generalized_attention(), own, "holds HedgehogParameters"),
    ]
    for function, projection, message in cases:
        with pytest.raises(ValueError, match=message):
            function(*inputs, projection=projection)
    for options, message in (
        ({"nb_features": 7}, "nb_features must be even, got 7"),
        ({"projection": "iid"}, "no random projection: leave out projection"),
        ({"projection_matrix": np.ones((3, D))}, "no random projection"),
        ({"calibration": "stored"}, "hedgehog.*has no parameters from data"),
    ):
        with pytest.raises(ValueError, match=message):
            make(estimator="hedgehog", **options)
