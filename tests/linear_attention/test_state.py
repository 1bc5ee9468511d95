"""One mergeable state: cut a sequence anywhere, decode token by token, merge in any order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.linear_attention import (
    LinearAttentionState,
    empty_state,
    linear_attention,
    merge,
    prefill,
    step,
)
from tests.linear_attention import cases

T, CUT = 12, 8


def random_state(seed, scaled):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 4))
    k_sum = rng.uniform(1, 4, size=(2, 4))
    scale = None
    if scaled:
        scale = rng.choice([-1e30, -300.0, -3.0, 0.0, 2.0, 300.0], size=(2, 4))
        empty = scale == -1e30
        x, k_sum = np.where(empty[:, None], 0, x), np.where(empty, 0, k_sum)
        scale = jnp.asarray(scale, jnp.float32)
    return LinearAttentionState(jnp.asarray(x, jnp.float32), jnp.asarray(k_sum, jnp.float32), scale)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), scaled=st.booleans())
def test_merge_is_associative_and_commutative(seed, scaled):
    a, b, c = (random_state((seed, i), scaled) for i in range(3))
    left, right = merge(merge(a, b), c), merge(a, merge(c, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), left, right)
    jax.tree.map(np.testing.assert_array_equal, merge(a, b), merge(b, a))


def test_merge_adds_the_keys_of_both_sides():
    _, k, v = cases.qkv(length=T)
    absorb = functools.partial(
        linear_attention,
        feature_map=cases.MAPS["positive"],
        parameters=cases.parameters_of("positive"),
        return_state=True,
        implementation="reference",
    )
    query = cases.qkv(length=1)[0]
    _, whole = absorb(query, k, v)
    _, left = absorb(query, k[:, :CUT], v[:, :CUT])
    _, right = absorb(query, k[:, CUT:], v[:, CUT:])
    merged = merge(right, left)
    cases.assert_close(cases.true_state(merged), cases.true_state(whole), 1e-5)
    empty = empty_state(
        cases.MAPS["positive"],
        cases.parameters_of("positive"),
        (cases.B,),
        cases.K,
        cases.D,
        cases.V,
    )
    jax.tree.map(np.testing.assert_array_equal, merge(empty, whole), whole)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_split_and_resumed_is_whole(name, implementation):
    q, k, v = cases.qkv(length=T)
    attend = functools.partial(
        linear_attention,
        feature_map=cases.MAPS[name],
        causal=True,
        chunk_size=cases.CHUNK,
        return_state=True,
    )

    def whole(smooth):
        q, k, v, parameters = smooth
        return attend(q, k, v, parameters=parameters, implementation="reference")

    def split(smooth):
        q, k, v, parameters = smooth
        first, state = attend(
            q[:, :CUT],
            k[:, :CUT],
            v[:, :CUT],
            parameters=parameters,
            implementation=implementation,
        )
        second, state = attend(
            q[:, CUT:],
            k[:, CUT:],
            v[:, CUT:],
            parameters=parameters,
            initial_state=state,
            implementation=implementation,
        )
        return jnp.concatenate([first, second], 1), state

    def differentiated(function):
        def loss(smooth):
            out, state = function(smooth)
            result = (out, *cases.true_state(state))
            return cases.weighted_sum(result), result

        return cases.compiled(jax.grad(loss, has_aux=True))

    smooth = (q, k, v, cases.parameters_of(name))
    cases.assert_close(differentiated(split)(smooth), differentiated(whole)(smooth), 1e-5)


@pytest.mark.parametrize(
    "attention",
    [
        make_fast_softmax_attention(nb_features=cases.M, unidirectional=True, chunk_size=4),
        make_fast_softmax_attention(cases.D, estimator="hyperbolic", renormalize_attention=False),
        make_fast_softmax_attention(
            nb_features=64, nonnegative_features=False, implementation="reference"
        ),
        make_fast_generalized_attention(cases.D, kernel_fn="elu+1", implementation="reference"),
    ],
    ids=["positive", "hyperbolic", "trigonometric", "elu+1"],
)
def test_prefill_and_steps_are_the_whole(attention):
    """Prompts of different lengths, padded on the left or on the right."""
    q, k, v = cases.qkv(length=T)
    lengths, prompt = (5, 3), 5
    whole = attention(q, k, v, is_causal=True)
    steps = jax.jit(attention.step)
    for padded_left in (True, False):
        rows = [
            np.clip(np.arange(prompt) - (prompt - n if padded_left else 0), 0, n - 1)
            for n in lengths
        ]
        visible = np.stack([np.arange(prompt) < n for n in lengths])
        if padded_left:
            visible = visible[:, ::-1]
        take = lambda x: jnp.stack([row[r] for row, r in zip(x, rows, strict=True)])  # noqa: B023, E731
        hide = lambda x: jnp.where(visible[..., None, None], x, 77.0)  # noqa: B023, E731
        state = attention.init_state((cases.B,), cases.K, cases.D, cases.V, max_length=3)
        out, state = attention.prefill(
            state, take(q), hide(take(k)), hide(take(v)), key_mask=jnp.asarray(visible)
        )
        for row, n in enumerate(lengths):
            cases.assert_close(out[row][visible[row]], whole[row, :n], 1e-5)
        for i in range(T - prompt):
            now = jnp.asarray([n + i for n in lengths])[:, None, None, None]
            token = [jnp.take_along_axis(x, now, 1)[:, 0] for x in (q, k, v)]
            before = jax.tree.map(jnp.shape, state)
            out, state = steps(state, *token)
            assert jax.tree.map(jnp.shape, state) == before
            for row, n in enumerate(lengths):
                cases.assert_close(out[row], whole[row, n + i], 1e-5)


def test_functions_of_the_core_take_any_batch_axes():
    feature_map = cases.MAPS["positive"]
    options = {"feature_map": feature_map, "parameters": cases.parameters_of("positive")}
    q, k, v = (x[0] for x in cases.qkv(length=4))
    state = empty_state(feature_map, options["parameters"], (), cases.K, cases.D, cases.V)
    whole = linear_attention(q, k, v, causal=True, implementation="reference", **options)
    out, state = prefill(state, q[:3], k[:3], v[:3], implementation="reference", **options)
    cases.assert_close(out, whole[:3], 1e-5)
    out, state = step(state, q[3], k[3], v[3], **options)
    cases.assert_close(out, whole[3], 1e-5)
    grouped = [x.reshape(2, 2, *x.shape[1:]) for x in cases.qkv(length=4, batch=4)]
    nested = linear_attention(*grouped, implementation="reference", **options)
    flat = linear_attention(*cases.qkv(length=4, batch=4), implementation="reference", **options)
    np.testing.assert_array_equal(nested.reshape(flat.shape), flat)


@pytest.mark.parametrize("resume", ["linear_attention", "step"])
@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_a_bias_before_the_cut_stays_in_the_state(implementation, resume):
    """Maps without exponents get a scale from a bias; it must not be lost without one."""
    q, k, v = cases.qkv(length=4)
    options = {"feature_map": cases.MAPS["elu+1"], "parameters": None}
    attend = functools.partial(
        linear_attention, causal=True, implementation=implementation, **options
    )
    bias = jnp.asarray([[3.0, -2.0, 1.0, 0.0]] * cases.B)
    whole = attend(q, k, v, key_bias=bias)
    _, state = attend(q[:, :3], k[:, :3], v[:, :3], key_bias=bias[:, :3], return_state=True)
    if resume == "step":
        out, _ = step(state, q[:, 3], k[:, 3], v[:, 3], **options)
    else:
        out = attend(q[:, 3:], k[:, 3:], v[:, 3:], initial_state=state)[:, 0]
    cases.assert_close(out, whole[:, 3], 1e-5)
