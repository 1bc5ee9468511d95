"""One mergeable state: cut a sequence anywhere, decode token by token, merge in any order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.linear import (
    LinearAttentionState,
    empty_state,
    merge,
    prefill,
    step,
)
from tests.linear import cases

T, CUT = 16, 8


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
    options = {
        "feature_map": cases.MAPS["positive"],
        "parameters": cases.parameters_of("positive"),
        "return_state": True,
        "implementation": "quadratic",
    }
    query = cases.qkv(length=1)[0]

    @cases.compiled
    def states(k, v):
        parts = slice(None), slice(CUT), slice(CUT, None)
        whole, left, right = (
            cases.attend(query, k[:, part], v[:, part], **options)[1] for part in parts
        )
        empty = empty_state(
            options["feature_map"],
            options["parameters"],
            (cases.B,),
            cases.K,
            cases.D,
            cases.V,
        )
        sums = cases.true_state(merge(right, left)), cases.true_state(whole)
        return sums, (merge(empty, whole), whole)

    sums, states_of_all = states(k, v)
    cases.assert_close(*sums, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, *states_of_all)


def attend_causally(name, q, k, v, parameters, **options):
    return cases.attend(
        q,
        k,
        v,
        feature_map=cases.MAPS[name],
        parameters=parameters,
        causal=True,
        chunk_size=cases.CHUNK,
        return_state=True,
        **options,
    )


def differentiated(function, name):
    def loss(smooth):
        out, state = function(smooth)
        result = (out, *cases.true_state(state))
        return cases.weighted_sum(result), result

    smooth = (*cases.qkv(length=T), cases.parameters_of(name))
    return cases.compiled(jax.grad(loss, has_aux=True))(smooth)


@functools.cache
def differentiated_whole(name):
    return differentiated(
        lambda smooth: attend_causally(name, *smooth, implementation="quadratic"), name
    )


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(("positive", kind) for kind in cases.IMPLEMENTATIONS),
        ("relu", "chunked"),
        ("positive", "time_minor_chunks"),
    ],
)
def test_split_and_resumed_is_whole(name, implementation):
    attend = functools.partial(attend_causally, name, implementation=implementation)

    def split(smooth):
        q, k, v, parameters = smooth
        first, state = attend(q[:, :CUT], k[:, :CUT], v[:, :CUT], parameters)
        second, state = attend(q[:, CUT:], k[:, CUT:], v[:, CUT:], parameters, initial_state=state)
        return jnp.concatenate([first, second], 1), state

    cases.assert_close(differentiated(split, name), differentiated_whole(name), 1e-5)


@pytest.mark.parametrize(
    "attention",
    [
        make_fast_softmax_attention(nb_features=cases.M, unidirectional=True, chunk_size=4),
        make_fast_softmax_attention(cases.D, estimator="hyperbolic", renormalize_attention=False),
        make_fast_softmax_attention(
            nb_features=64, nonnegative_features=False, implementation="quadratic"
        ),
        make_fast_generalized_attention(cases.D, kernel_fn="elu+1", implementation="quadratic"),
    ],
    ids=["positive", "hyperbolic", "trigonometric", "elu+1"],
)
def test_prefill_and_steps_are_the_whole(attention):
    """Prompts of different lengths, padded on the left or on the right."""
    q, k, v = cases.qkv(length=T)
    lengths, prompt = (5, 3), 5
    whole = np.asarray(cases.compiled(functools.partial(attention, is_causal=True))(q, k, v))
    q, k, v = (np.asarray(x) for x in (q, k, v))
    prefill, steps = cases.compiled(attention.prefill), cases.compiled(attention.step)
    for padded_left in (True, False):
        rows = [
            np.clip(np.arange(prompt) - (prompt - n if padded_left else 0), 0, n - 1)
            for n in lengths
        ]
        visible = np.stack([np.arange(prompt) < n for n in lengths])
        if padded_left:
            visible = visible[:, ::-1]
        take = lambda x: np.stack([row[r] for row, r in zip(x, rows, strict=True)])  # noqa: B023, E731
        hide = lambda x: np.where(visible[..., None, None], x, np.float32(77))  # noqa: B023, E731
        state = attention.init_state((cases.B,), cases.K, cases.D, cases.V, max_length=3)
        out, state = prefill(state, take(q), hide(take(k)), hide(take(v)), key_mask=visible)
        out = np.asarray(out)
        for row, n in enumerate(lengths):
            cases.assert_close(out[row][visible[row]], whole[row, :n], 1e-5)
        for i in range(T - prompt):
            now = [n + i for n in lengths]
            token = [x[np.arange(cases.B), now] for x in (q, k, v)]
            before = jax.tree.map(jnp.shape, state)
            out, state = steps(state, *token)
            assert jax.tree.map(jnp.shape, state) == before
            for row, n in enumerate(lengths):
                cases.assert_close(out[row], whole[row, n + i], 1e-5)


def test_functions_of_the_core_take_any_batch_axes():
    feature_map = cases.MAPS["positive"]
    options = {"feature_map": feature_map, "parameters": cases.parameters_of("positive")}
    attend = functools.partial(cases.attend, implementation="quadratic", **options)

    @cases.compiled
    def without_batch(q, k, v):
        state = empty_state(feature_map, options["parameters"], (), cases.K, cases.D, cases.V)
        read, state = cases.with_plan(prefill)(
            state, q[:3], k[:3], v[:3], implementation="quadratic", **options
        )
        last, state = cases.with_plan(step)(state, q[3], k[3], v[3], **options)
        return jnp.concatenate([read, last[None]]), attend(q, k, v, causal=True)

    cases.assert_close(*without_batch(*(x[0] for x in cases.qkv(length=4))), 1e-5)
    arrays = cases.qkv(length=4, batch=4)
    grouped = [x.reshape(2, 2, *x.shape[1:]) for x in arrays]
    nested, flat = cases.compiled(lambda x, y: (attend(*x), attend(*y)))(grouped, arrays)
    np.testing.assert_array_equal(nested.reshape(flat.shape), flat)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_a_bias_before_the_cut_stays_in_the_state(implementation):
    """Maps without exponents get a scale from a bias; it must not be lost without one."""
    options = {"feature_map": cases.MAPS["elu+1"], "parameters": None}
    attend = functools.partial(
        cases.attend, causal=True, chunk_size=4, implementation=implementation, **options
    )
    bias = jnp.asarray([[3.0, -2.0, 1.0, -1.0, *[0.0] * 4]] * cases.B)

    @cases.compiled
    def outputs(q, k, v):
        whole = attend(q, k, v, key_bias=bias)
        _, state = attend(q[:, :4], k[:, :4], v[:, :4], key_bias=bias[:, :4], return_state=True)
        stepped, _ = cases.with_plan(step)(state, q[:, 4], k[:, 4], v[:, 4], **options)
        resumed = attend(q[:, 4:], k[:, 4:], v[:, 4:], initial_state=state)[:, 0]
        return (stepped, resumed), whole[:, 4]

    after_the_cut, expected = outputs(*cases.qkv(length=8))
    for out in after_the_cut:
        cases.assert_close(out, expected, 1e-5)
