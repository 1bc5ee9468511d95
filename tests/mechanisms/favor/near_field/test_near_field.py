"""Laws of the near field against its definition: values, gradients, masks, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.feature_maps import PositiveFeatures, TrigonometricFeatures
from fast_attention.mechanisms.favor.near_field import near_field_attention
from fast_attention.softmax_attention import make_softmax_attention
from tests.leaks import checking_leaks
from tests.linear import cases
from tests.mechanisms.favor.near_field.definition import near_field

B, T, H, K, D, V, M = cases.B, cases.T, cases.H, cases.K, cases.D, cases.V, cases.M
MAP = PositiveFeatures(M)
CHUNK = 4
near = cases.with_plan(near_field_attention)


@functools.cache
def projection():
    return np.asarray(MAP.init(jax.random.key(0), D))


def attend(window, causal, **options):
    """Returns ``(q, k, v, **masks) -> out``."""
    return functools.partial(
        near,
        feature_map=MAP,
        parameters=jnp.asarray(projection()),
        exact_window=window,
        causal=causal,
        chunk_size=CHUNK,
        **options,
    )


def run(window, causal, *arguments, **options):
    return cases.compiled(attend(window, causal, **options))(*arguments)


def values_and_gradients(function):
    def both(q, k, v):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(jnp.ones_like(out))

    return cases.compiled(both)


@functools.cache
def defined(window, causal, normalize=True):
    def run(q, k, v, bias=None, mask=None, segments=None):
        return near_field(
            q, k, v, projection().astype(float), bias, window, causal, mask, segments, normalize
        )

    def double(*arguments):
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda x: np.asarray(x, float) if np.asarray(x).dtype.kind != "b" else x, arguments
            )
            return np.asarray(run(*wide))

    return double


@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_with_everything_at_once(causal):
    """Hidden keys, biases, segments, grouped queries, values of another width, and V' != 1."""
    window, length = 3, T
    q, k, v = (np.asarray(x) for x in cases.qkv(1, length=length))
    bias = cases.draw(2, B, length).astype(np.float32)
    mask = np.arange(length)[None] < np.array([length, length - 2])[:, None]
    mask[:, 4] = False
    segments = np.stack([np.repeat([0, 1, 2], [5, 7, 1]), np.repeat([0, 1, 2], [1, 10, 2])])
    cotangent = cases.draw(3, B, length, H, V)

    def gradients(function, dtype):
        smooth = tuple(jnp.asarray(x, dtype) for x in (q, k, v, projection(), bias))

        def loss(smooth):
            out = function(*smooth)
            return jnp.sum(out * jnp.asarray(cotangent, dtype)), out

        return cases.compiled(jax.grad(loss, has_aux=True))(smooth)

    def ours(q, k, v, projection, bias):
        return near(
            q,
            k,
            v,
            feature_map=MAP,
            parameters=projection,
            exact_window=window,
            causal=causal,
            key_mask=jnp.asarray(mask),
            key_bias=bias,
            segment_ids=jnp.asarray(segments),
            chunk_size=CHUNK,
            saved_states="few" if causal else "all",
        )

    actual = gradients(ours, jnp.float32)
    with jax.enable_x64(True):
        expected = gradients(lambda *x: near_field(*x, window, causal, mask, segments), jnp.float64)
        expected = jax.tree.map(np.asarray, expected)
    cases.assert_close(actual, expected, 2e-5)
    hidden = np.asarray(actual[0][1])[:, 4]
    assert not hidden.any()


@pytest.mark.parametrize(
    ("length", "window", "causal"),
    [
        (1, 1, True),
        (13, 1, True),
        (13, 12, True),
        (2, 1, False),
        (13, 7, False),
    ],
)
def test_any_length_and_window(length, window, causal):
    q, k, v = cases.qkv(length=length, scale=1.0)
    out = run(window, causal, q, k, v)
    cases.assert_close(out, defined(window, causal)(q, k, v), 1e-5)


def test_a_window_over_everything_is_softmax_attention():
    q, k, v = cases.qkv(length=T, scale=2.0)
    for causal, window in ((True, T), (True, 10 * T), (False, T - 1)):
        expected = make_softmax_attention(unidirectional=causal)(q, k, v)
        np.testing.assert_allclose(run(window, causal, q, k, v), expected, atol=1e-6)


def test_the_numerator_keeps_its_scale():
    q, k, v = cases.qkv(length=T)
    for causal in (True, False):
        out = run(2, causal, q, k, v, output="sum")
        cases.assert_close(out, defined(2, causal, False)(q, k, v), 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_masked_is_truncated(causal):
    q, k, v = (np.asarray(x) for x in cases.qkv(length=T))

    @cases.compiled
    def pulled(q, k, v, mask, cotangent):
        function = functools.partial(attend(2, causal), key_mask=mask)
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(cotangent)

    for part in (slice(0, T - 4), slice(4, T)):
        visible = np.zeros((B, T), bool)
        visible[:, part] = True
        shown = visible[..., None, None]
        cotangent = np.where(shown, cases.draw(5, B, T, H, V), 0).astype(np.float32)
        expected = pulled(*(x[:, part] for x in (q, k, v)), visible[:, part], cotangent[:, part])
        for content in (0.3, 1e4, np.nan):
            fill = lambda x: np.where(shown, x, np.float32(content))  # noqa: B023, E731
            out, grads = pulled(q, fill(k), fill(v), visible, cotangent)
            cases.assert_close((out[:, part], tuple(x[:, part] for x in grads)), expected, 1e-5)
            for gradient in grads:
                assert not np.asarray(gradient)[~visible].any()


def test_rows_that_see_nothing_are_zero():
    q, k, v = cases.qkv(length=T)
    mask = jnp.asarray(np.arange(T)[None] >= np.array([5, T])[:, None])
    for causal in (True, False):
        out, grads = values_and_gradients(attend(2, causal, key_mask=mask))(q, k, v)
        assert not out[1].any()
        assert (np.asarray(out)[0, :5] == 0).all() == causal
        assert all(np.isfinite(x).all() for x in grads)


def test_a_mask_and_a_bias_of_every_key_head():
    q, k, v = cases.qkv(length=T)
    mask = np.random.default_rng(0).random((B, T, K)) < 0.7
    bias = cases.draw(4, B, T, K).astype(np.float32)
    out = run(2, False, q, k, v, key_mask=jnp.asarray(mask), key_bias=jnp.asarray(bias))
    for head in range(K):
        heads = slice(head * H // K, (head + 1) * H // K)
        expected = defined(2, False)(
            q[:, :, heads],
            k[:, :, head : head + 1],
            v[:, :, head : head + 1],
            bias[..., head],
            mask[..., head],
        )
        cases.assert_close(out[:, :, heads], expected, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "causal"),
    [(jnp.float32, True), (jnp.bfloat16, True), (jnp.float16, True), (jnp.bfloat16, False)],
)
def test_the_past_is_bit_equal_and_huge_inputs_stay_finite(dtype, causal):
    q, k, v = (np.asarray(x) for x in cases.qkv(length=T, scale=1.0, dtype=dtype))

    both = values_and_gradients(attend(3, causal))
    out, _ = both(q, k, v)
    assert out.dtype == dtype
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2, jnp.float16: 2e-3}[dtype]
    cases.assert_close(out, defined(3, causal)(q, k, v), tolerance)
    for size in (1e2, 1e3):
        for t in (1, 3, 7, T - 1):
            later = (np.arange(T) >= t)[:, None, None]
            changed, grads = both(*(np.where(later, x * x.dtype.type(size), x) for x in (q, k, v)))
            if causal:
                np.testing.assert_array_equal(changed[:, :t], out[:, :t])
            assert np.isfinite(np.asarray(changed, np.float32)).all()
            assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in grads)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("causal", [True, False])
def test_squared_norms_of_200(causal):
    def sphere(seed):
        x = cases.draw(seed, B, T, K, D)
        return x * np.sqrt(200 * D**0.5) / np.linalg.norm(x, axis=-1, keepdims=True)

    tiny = np.where(np.arange(T)[None, :, None, None] < T // 2, 1e-3, 1.0)
    attend_once = cases.compiled(attend(3, causal))
    key, value = sphere(1), cases.draw(2, B, T, K, V)
    for q, k in (
        (sphere(0), key),
        (key, key),
        (-key, key),
        (sphere(0), key * tiny),
        (key, key * tiny[:, ::-1]),
        (-key * tiny, key),
    ):
        q, k, v = (np.asarray(x, np.float32) for x in (q, k, value))
        cases.assert_close(attend_once(q, k, v), defined(3, causal)(q, k, v), 1e-4)


def test_under_every_transformation():
    q, k, v = cases.qkv(length=4)
    with checking_leaks():
        cases.compiled(jax.vmap(attend(2, True)))(q, k, v)

    def gradient(function):
        loss = lambda *x: cases.weighted_sum(function(*x))  # noqa: E731
        return cases.compiled(jax.grad(loss, argnums=(0, 1, 2)))

    parameters = jnp.asarray(projection())

    def function(q, k, v):
        return near_field(q, k, v, parameters, None, 2, True, None, None)

    grads = gradient(jax.checkpoint(jax.vmap(attend(2, True))))(q, k, v)
    cases.assert_close(grads, gradient(function)(q, k, v), 1e-5)


def test_error_falls_with_features_and_with_the_window():
    length, heads, width = 32, 8, 16
    q, k = (jnp.asarray(cases.draw(s, 1, length, heads, width, scale=0.7)) for s in (0, 1))
    v = jnp.asarray(cases.draw(2, 1, length, heads, width))
    exact = make_softmax_attention()(q, k, v)

    def error(window, features):
        rows = jnp.asarray(cases.draw(3, features, width))
        function = make_fast_softmax_attention(projection_matrix=rows, exact_window=window)
        out = cases.compiled(function)(q, k, v)
        return float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))

    alone, near, nearer = (error(window, 32) for window in (None, 4, 12))
    assert nearer < near < alone
    assert error(4, 1024) < 0.5 * near


def test_every_positive_estimator_and_axes():
    q, k, v = cases.qkv(length=6)
    hyperbolic = make_fast_softmax_attention(nb_features=M, estimator="hyperbolic", exact_window=5)
    expected = make_softmax_attention()(q, k, v)
    np.testing.assert_allclose(cases.compiled(hyperbolic)(q, k, v), expected, atol=1e-6)
    fast = make_fast_softmax_attention(projection_matrix=jnp.asarray(projection()), exact_window=2)
    grid = (x.reshape(B, 2, 3, *x.shape[2:]) for x in (q, k, v))
    out = cases.compiled(functools.partial(fast, axis=(1, 2)))(*grid).reshape(B, 6, H, V)
    cases.assert_close(out, defined(2, False)(q, k, v), 1e-5)


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_windows_that_are_none(window):
    with pytest.raises(ValueError, match="exact_window must be a positive whole number"):
        make_fast_softmax_attention(exact_window=window)


def test_what_does_not_combine():
    with pytest.raises(ValueError, match="positive"):
        make_fast_softmax_attention(nonnegative_features=False, exact_window=2)
    q, k, v = cases.qkv(length=4)
    for feature_map in (TrigonometricFeatures(M), cases.MAPS["relu"]):
        with pytest.raises(ValueError, match="positive features"):
            near(q, k, v, feature_map=feature_map, parameters=None, exact_window=2)
    with pytest.raises(ValueError, match="computed by one of the implementations"):
        make_fast_softmax_attention(exact_window=2, implementation="quadratic")
    with pytest.raises(TypeError, match="exact_window"):
        make_fast_generalized_attention(exact_window=2)


@pytest.mark.usefixtures("optimized")
def test_memory_is_linear():
    length, heads, width, features, window = 4096, 2, 64, 1024, 128
    x = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)

    def loss(*arrays):
        out = near(
            *arrays,
            feature_map=MAP,
            parameters=jnp.zeros((features, width)),
            exact_window=window,
            causal=True,
            saved_states="few",
        )
        return jnp.sum(out**2)

    program = cases.compiled(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    size = program.memory_analysis().temp_size_in_bytes
    # Gradients, the output, states between groups of chunks; features of all queries and keys
    # alone would take 32.
    assert size < 8 * length * heads * width * 4
