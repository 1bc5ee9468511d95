"""The attention functions: masks, biases, axes, dropout, projections, types, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from tests.leaks import checking_leaks
from tests.linear import cases
from tests.mechanisms.test_table import all_equations

B, T, H, D, V, M = 2, 6, 4, 8, 5, 16
softmax = functools.partial(
    make_fast_softmax_attention, D, nb_features=M, implementation="quadratic"
)
generalized = functools.partial(make_fast_generalized_attention, D, implementation="quadratic")
PADDING = np.array([[True] * 6, [False, True, True, True, True, False]])
KEYS = PADDING[:, None, None, :]
PAIRS = PADDING[:, None, :, None] & KEYS
CAUSAL = np.tril(np.ones((T, T), bool))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


QKV = (draw(0, B, T, H, D), draw(1, B, T, H, D), draw(2, B, T, H, V))


def bound(attention):
    """The computation a function stands for, at the level below."""
    return functools.partial(
        cases.attend,
        feature_map=attention.feature_map,
        parameters=attention.draw_projection(jax.random.key(attention.seed), D),
        epsilon=attention.epsilon,
        implementation="quadratic",
    )


@pytest.mark.parametrize(
    ("mask", "causal", "dtype"),
    [
        (KEYS, False, bool),
        (KEYS, True, np.float32),
        (np.repeat(KEYS, H, 1), True, bool),
        (PAIRS, False, np.float32),
        (PAIRS, True, bool),
    ],
    ids=["keys", "keys-causal", "heads-causal", "TS", "TS-causal"],
)
def test_masks_are_key_masks(mask, causal, dtype):
    attention = softmax(unidirectional=causal)
    expected = bound(attention)(*QKV, causal=causal, key_mask=jnp.asarray(PADDING))
    if causal and mask is PAIRS:
        mask = mask & CAUSAL
    masked = jnp.asarray(mask.astype(dtype))
    for out in (
        attention(*QKV, mask=masked),
        attention(*QKV, key_mask=jnp.asarray(PADDING)),
        attention(*QKV, mask=masked, key_mask=jnp.asarray(PADDING)),
    ):
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("low", [-np.inf, -1e9, np.finfo(np.float32).min])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["quadratic", "chunked"])
def test_low_biases_mask(low, causal, implementation):
    """Where some key is visible; large norms make the rounding of a scale of -1e9 show."""
    attention = softmax(unidirectional=causal, implementation=implementation)
    q, k, v = 4 * QKV[0], 4 * QKV[1], QKV[2]
    bias = jnp.asarray(np.where(KEYS, 0, low), jnp.float32)
    expected = attention(q, k, v, key_mask=jnp.asarray(PADDING))
    out = attention(q, k, v, bias=bias)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [softmax, generalized])
def test_bias_is_a_factor_on_keys(make):
    bias = draw(3, B, H, 1, T)
    attention = make()
    expected = bound(attention)(*QKV, key_bias=jnp.swapaxes(bias[:, :, 0], 1, 2))
    for given in (bias, jnp.broadcast_to(bias, (B, H, T, T))):
        np.testing.assert_allclose(attention(*QKV, bias=given), expected, rtol=1e-5, atol=1e-6)


def test_many_features_are_softmax_attention_with_its_bias():
    q, k, v = (0.5 * x for x in (QKV[0], QKV[1], draw(2, B, T, H, D)))
    bias = draw(3, B, 1, 1, T)
    attention = make_fast_softmax_attention(D, nb_features=4096)
    expected = jax.nn.dot_product_attention(q, k, v, jnp.broadcast_to(bias, (B, H, T, T)))
    few = make_fast_softmax_attention(D, nb_features=8)
    error, coarse = (
        jnp.abs(function(q, k, v, bias=bias) - expected).max() for function in (attention, few)
    )
    assert error < 0.02 < coarse


@pytest.mark.parametrize(
    ("axis", "causal"),
    [(1, True), (2, False), (-3, True), (-4, False), ((1, 2), False), ((-3, 1), True)],
)
def test_axes(axis, causal):
    shape = (B, 3, 4, H)
    q, k, v = draw(0, *shape, D), draw(1, *shape, D), draw(2, *shape, V)
    visible = jnp.asarray(np.random.default_rng(3).random(shape[:3]) < 0.7)
    attention = softmax(unidirectional=causal)
    out = attention(q, k, v, axis=axis, key_mask=visible)
    if axis in ((1, 2), (-3, 1)):
        flat = [x.reshape(B, 12, *x.shape[3:]) for x in (q, k, v, visible)]
        expected = attention(*flat[:3], key_mask=flat[3]).reshape(*shape, V)
    elif axis in (1, -4):
        turned = [jnp.swapaxes(x, 1, 2) for x in (q, k, v, visible)]
        expected = jnp.swapaxes(attention(*turned[:3], key_mask=turned[3]), 1, 2)
    else:
        expected = attention(q, k, v, key_mask=visible)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_shapes_and_grouped_heads():
    q, k, v = draw(0, T, H, D), draw(1, 9, 2, D), draw(2, 9, 2, V)
    attention = softmax()
    out = attention(q, k, v)
    repeated = attention(q, jnp.repeat(k, 2, -2), jnp.repeat(v, 2, -2))
    assert out.shape == (T, H, V)
    np.testing.assert_allclose(out, repeated, rtol=1e-5, atol=1e-6)
    # One query over a cache: the mask decides, not causality.
    one = q[:1]
    visible = jnp.arange(9)[None, None] < 4
    cached = softmax(unidirectional=True)(one, k, v, mask=visible, is_causal=True)
    np.testing.assert_allclose(cached, attention(one, k[:4], v[:4]), rtol=1e-5, atol=1e-6)


def test_segments():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2]] * B)
    attention = softmax()
    out = attention(*QKV, segment_ids=ids)
    for part in (slice(0, 3), slice(3, 6)):
        alone = attention(*(x[:, part] for x in QKV))
        np.testing.assert_allclose(out[:, part], alone, rtol=1e-5, atol=1e-6)


def test_seeds_and_projections():
    first, again, other = softmax(seed=1), softmax(seed=1), softmax(seed=2)
    np.testing.assert_array_equal(first(*QKV), again(*QKV))
    assert (np.asarray(first(*QKV)) != np.asarray(other(*QKV))).any()
    w = other.draw_projection(jax.random.key(2), D)
    assert w.shape == (M, D) and w.dtype == jnp.float32
    np.testing.assert_array_equal(first(*QKV, projection=w), other(*QKV))
    np.testing.assert_array_equal(softmax(projection_matrix=w)(*QKV), other(*QKV))
    np.testing.assert_array_equal(jax.jit(first)(*QKV), jax.jit(again)(*QKV))
    assert generalized().draw_projection(jax.random.key(0), D) is None
    differentiated = jax.grad(lambda w: jnp.sum(first(*QKV, projection=w) ** 2))(w)
    assert np.asarray(differentiated).any()


def test_redrawn_in_training_only_and_never_from_data():
    attention = softmax(redraw_features=True)
    fixed = attention(*QKV)
    a, b = jax.random.key(1), jax.random.key(2)
    train = functools.partial(attention, *QKV)
    assert (np.asarray(train(dropout_rng=a)) != np.asarray(train(dropout_rng=b))).any()
    np.testing.assert_array_equal(train(dropout_rng=a), train(dropout_rng=a))
    np.testing.assert_array_equal(train(dropout_rng=a, deterministic=True), fixed)
    np.testing.assert_array_equal(softmax(redraw_features=False)(*QKV, dropout_rng=a), fixed)
    # Another row's data leaves a row's projection, hence its result, as it was.
    changed = attention(*(x.at[1].set(0.3) for x in QKV), dropout_rng=a)
    np.testing.assert_array_equal(changed[0], train(dropout_rng=a)[0])


def test_dropout_drops_keys_and_keeps_the_mean():
    rate = 0.25
    attention = softmax(redraw_features=False)
    ones = jnp.ones_like(QKV[2])
    train = jax.jit(
        jax.vmap(lambda key: attention(QKV[0], QKV[1], ones, dropout_rng=key, dropout_rate=rate))
    )
    out = np.asarray(train(jax.random.split(jax.random.key(0), 2000)))
    np.testing.assert_allclose(out.mean(0), 1, atol=0.1)
    assert out.std() > 0.1
    together = out[0]
    np.testing.assert_allclose(together[..., :1], together[..., -1:], rtol=1e-5)
    fixed = attention(*QKV, deterministic=True, dropout_rate=rate)
    np.testing.assert_array_equal(fixed, attention(*QKV))
    # With identical queries, keys and values in all rows only dropout can tell them apart.
    same = [jnp.broadcast_to(x[:1, :, :1], x.shape) for x in QKV]
    drop = functools.partial(attention, *same, dropout_rng=jax.random.key(3), dropout_rate=0.5)
    shared, apart = drop(), drop(broadcast_dropout=False)
    np.testing.assert_allclose(shared[0], shared[1], rtol=1e-6)
    np.testing.assert_allclose(shared[:, :, 0], shared[:, :, 1], rtol=1e-6)
    assert (np.asarray(apart[0]) != np.asarray(apart[1])).any()
    assert (np.asarray(apart[:, :, 0]) != np.asarray(apart[:, :, 1])).any()


@pytest.mark.parametrize("make", [softmax, generalized])
def test_types(make):
    attention = make()
    half = [x.astype(jnp.bfloat16) for x in QKV]
    assert attention(*half).dtype == jnp.bfloat16
    assert attention(half[0], half[1], QKV[2]).dtype == jnp.float32
    assert attention(*QKV, dtype=jnp.float16).dtype == jnp.float16
    out = attention(*half, dtype=jnp.float32)
    assert out.dtype == jnp.float32
    exact = attention(*(x.astype(jnp.float32) for x in half))
    np.testing.assert_array_equal(out, exact)
    np.testing.assert_allclose(attention(*half).astype(jnp.float32), exact, rtol=0.02, atol=0.02)


def test_a_function_holds_no_state():
    attention = softmax(implementation="chunked")
    with pytest.raises(AttributeError):
        attention.seed = 3
    with checking_leaks():
        traced = jax.jit(attention)(*QKV)
    np.testing.assert_allclose(traced, attention(*QKV), rtol=1e-5, atol=1e-6)
    hash(attention)


@pytest.mark.parametrize("estimator", ["favor+", "hyperbolic", "trigonometric"])
def test_estimators_have_their_number_of_features(estimator):
    attention = make_fast_softmax_attention(D, nb_features=6, estimator=estimator)
    state = attention.init_state((B,), H, D, V)
    count = {"favor+": 6, "hyperbolic": 6, "trigonometric": 12}[estimator]
    assert state.kv.shape == (B, H, V, count)
    assert attention.init_state((B,), H, D, V, max_length=9).kv.shape == state.kv.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": jnp.ones((T, T + 1), bool)}, "mask must be broadcastable"),
        ({"mask": draw(5, T, T) > 0}, "mask .* is not supported"),
        ({"mask": jnp.asarray(CAUSAL)}, "unidirectional=True"),
        ({"mask": jnp.where(CAUSAL, 0, -1e9)}, "additive mask goes into bias"),
        ({"bias": draw(5, T, T)}, "bias .* depends on the query"),
        ({"bias": draw(5, T - 1)}, "bias must be broadcastable"),
        ({"module": object()}, "sow_weights"),
        ({"input_positions": jnp.arange(T)}, "input_positions"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "einsum"),
        ({"attn_weights_value_einsum": jnp.einsum}, "einsum"),
        ({"dropout_rate": 0.1}, "needs a dropout_rng"),
        ({"axis": 3}, "axis must name"),
    ],
)
def test_calls_that_cannot_be_honoured(options, message):
    with pytest.raises(ValueError, match=message):
        softmax()(*QKV, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((B, T, H, 4), (B, T, H, 4), (B, T, H, V)), "qkv_dim=8, but .* width 4"),
        (((B, T, H, D), (B, 3, T, D), (B, 3, T, V)), "swapped"),
        (((B, H, T, D), (B, H, 4, D), (B, H, 4, V)), "swapped"),
        (((T, D), (T, D), (T, V)), "length, heads, width"),
    ],
)
def test_wrong_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        softmax()(*(jnp.ones(shape) for shape in shapes))


def test_a_signed_kernel_of_ones_own_is_guarded_as_the_named_one_is():
    """Where a denominator vanishes, ``den / stabilizer^2`` takes the place of its inverse."""
    query, key = jnp.asarray([[[1.0, 0.0]]]), jnp.asarray([[[0.0, 1.0]]])
    value = jnp.ones((1, 1, 1))
    for stabilizer in (1e-3, 0.1):
        options = {"kernel_epsilon": 0.0, "numerical_stabilizer": stabilizer}
        near = key.at[0, 0, 0].set(stabilizer / 2)
        own = lambda x: x  # noqa: E731
        found = [
            make_fast_generalized_attention(kernel_fn=kernel, **options, **told)(query, near, value)
            for kernel, told in (("identity", {}), (own, {"signed_kernel": True}))
        ]
        np.testing.assert_array_equal(*found)
        with pytest.raises(ValueError, match="signed_kernel must be True or False"):
            make_fast_generalized_attention(kernel_fn=own, **options)
        exact = make_fast_generalized_attention(kernel_fn=own, signed_kernel=False, **options)
        np.testing.assert_allclose(exact(query, near, value), 1, rtol=1e-6)
        np.testing.assert_allclose(found[0], 0.25, rtol=1e-5)
    assert make_fast_generalized_attention(kernel_fn=own).epsilon == 1e-6


def test_unknown_keywords_are_type_errors():
    with pytest.raises(TypeError, match="maks"):
        softmax()(*QKV, maks=None)
    with pytest.raises(TypeError, match="nb_featurs"):
        softmax(nb_featurs=3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (softmax, {"estimator": "favor"}, "Unknown estimator 'favor'"),
        (softmax, {"estimator": "favor+", "nonnegative_features": False}, "only one of the two"),
        (softmax, {"estimator": "hyperbolic", "nb_features": 7}, "must be even, got 7"),
        (softmax, {"ortho_scaling": 0.5}, "ortho_scaling must be 0 .* or 1"),
        (softmax, {"nb_features": 0}, "nb_features must be a positive whole number, got 0"),
        (softmax, {"chunk_size": 1.5}, "chunk_size must be a positive whole number"),
        (
            softmax,
            {"saved_states": "none"},
            "'all', 'few' or None, got 'none'",
        ),
        (softmax, {"lax_scan_unroll": 0}, "lax_scan_unroll"),
        (softmax, {"numerical_stabilizer": -1.0}, "of at least 0, got -1"),
        (softmax, {"projection_matrix": jnp.ones((4, 7))}, r"= \[M, 8\], got shape \(4, 7\)"),
        (generalized, {"features_type": "orthogonal"}, "'deterministic', 'iid' or 'ortho'"),
        (generalized, {"kernel_fn": "swish"}, "Unknown kernel 'swish'"),
        (
            generalized,
            {"kernel_epsilon": -1.0},
            "kernel_epsilon must be a finite number of at least 0",
        ),
        (generalized, {"ortho_scaling": 2}, "ortho_scaling must be 0"),
        (generalized, {"projection_matrix": jnp.ones((4, 8))}, "has no projection"),
    ],
)
def test_options_that_make_no_sense(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_constants_under_jit_are_checked_as_outside(array):
    """A mask that a jitted function closes over is as concrete as any."""
    q, k, v = QKV

    @jax.jit
    def attend(q):
        biased = softmax()(q, k, v, bias=zeros)
        grouped = softmax()(q, k[:, :, :2], v[:, :, :2], mask=heads)
        return softmax()(q, k, v, mask=pairs), biased, grouped

    pairs, heads = array(PAIRS), array(np.repeat(KEYS, H, 1))
    zeros = array(np.zeros((1, 1, T, T), np.float32))
    np.testing.assert_allclose(
        attend(q)[0], softmax()(q, k, v, key_mask=jnp.asarray(PADDING)), rtol=1e-5, atol=1e-6
    )
    causal = array(CAUSAL)
    with pytest.raises(ValueError, match="unidirectional=True"):
        jax.jit(lambda q: softmax()(q, k, v, mask=causal))(q)


def test_check_masks_finds_a_bad_mask_under_jit():
    bad = draw(5, T, T) > 0
    jax.block_until_ready(jax.jit(lambda mask: softmax()(*QKV, mask=mask))(bad))
    checked = jax.jit(lambda mask: softmax(check_masks=True)(*QKV, mask=mask))
    jax.block_until_ready(checked(jnp.asarray(PAIRS)))
    jax.effects_barrier()
    with pytest.raises(Exception, match="neither constant over queries"):
        jax.block_until_ready(checked(bad))
        jax.effects_barrier()


@pytest.mark.parametrize("exact_window", [None, 2])
def test_prompts_are_read_by_the_loop_that_was_asked_for(exact_window):
    """Chunks are unrolled, and states saved for the backward pass, as in a call."""

    def shapes_and_unrolls(**more):
        function = make_fast_softmax_attention(
            D,
            nb_features=M,
            unidirectional=True,
            chunk_size=2,
            exact_window=exact_window,
            **more,
        )
        state = function.init_state((B,), H, D, D)

        def total(x):
            return function.prefill(state, x, x, x)[0].sum()

        program = jax.make_jaxpr(jax.grad(total))(draw(0, B, 34, H, D))
        equations = list(all_equations(program.jaxpr))
        shapes = {x.aval.shape for equation in equations for x in equation.outvars}
        return shapes, {x.params["unroll"] for x in equations if x.primitive.name == "scan"}

    few, once = shapes_and_unrolls(saved_states="few", lax_scan_unroll=1)
    every, thrice = shapes_and_unrolls(saved_states="all", lax_scan_unroll=3)
    # The states before all 17 chunks, K V M numbers each.
    states = {shape for shape in every if 17 in shape and {B, H, D, M} <= set(shape)}
    assert states and not states & few
    assert 3 in thrice and 3 not in once
