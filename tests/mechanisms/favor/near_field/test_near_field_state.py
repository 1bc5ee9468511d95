"""Decoding with a near field: prefill and steps are the whole, wherever the cuts are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.linear.state import LinearAttentionState
from tests.linear import cases

B, T, K, D, V = cases.B, cases.T, cases.K, cases.D, cases.V


def attention(window, **options):
    return make_fast_softmax_attention(
        nb_features=cases.M, unidirectional=True, exact_window=window, chunk_size=4, **options
    )


@pytest.mark.parametrize(
    ("window", "options"),
    [
        (1, {}),
        (4, {"renormalize_attention": False}),
        (4, {"estimator": "wderf_s"}),
        (20, {"estimator": "hyperbolic"}),
    ],
)
def test_prefill_and_steps_are_the_whole(window, options):
    """Two prompts of different lengths, padded on either side, more tokens at once, then steps."""
    function = attention(window, **options)
    q, k, v = (np.asarray(x) for x in cases.qkv(length=T))
    whole = np.asarray(cases.compiled(function)(q, k, v))
    prefill, step = cases.compiled(function.prefill), cases.compiled(function.step)
    lengths, prompt, rows = (6, 3), 6, np.arange(B)
    for padded_left in (True, False):
        visible = np.stack([np.arange(prompt) < n for n in lengths])
        if padded_left:
            visible = visible[:, ::-1]
        place = np.maximum(np.cumsum(visible, axis=1) - 1, 0)

        def given(x, place=place, visible=visible):
            x = np.take_along_axis(x, place[..., None, None], axis=1)
            return np.where(visible[..., None, None], x, np.float32(77))

        state = function.init_state((B,), K, D, V)
        out, state = prefill(state, given(q), given(k), given(v), key_mask=visible)
        for row, n in enumerate(lengths):
            cases.assert_close(np.asarray(out)[row][visible[row]], whole[row, :n], 1e-5)
        more = np.array(lengths)[:, None] + np.arange(2)
        out, state = prefill(
            state, *(np.take_along_axis(x, more[..., None, None], axis=1) for x in (q, k, v))
        )
        for row in rows:
            cases.assert_close(out[row], whole[row, more[row]], 1e-5)
        for i in range(T - prompt - 2):
            now = more[:, -1] + 1 + i
            out, after = step(state, *(x[rows, now] for x in (q, k, v)))
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
            state = after
            cases.assert_close(out, whole[rows, now], 1e-5)
        np.testing.assert_array_equal(state.near.length, now + 1)


def test_steps_alone_without_a_batch_and_in_half_precision():
    function = attention(3)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        q, k, v = (x[0] for x in cases.qkv(length=T, dtype=dtype))
        state = function.init_state((), K, D, V)

        @cases.compiled
        def steps(state, q, k, v):
            def body(state, token):
                out, state = function.step(state, *token)
                return state, out

            return jax.lax.scan(body, state, (q, k, v))[1]

        out = steps(state, q, k, v)
        assert out.dtype == dtype
        cases.assert_close(out, cases.compiled(function)(q, k, v), tolerance)


def test_the_state_holds_the_far_keys_and_the_window():
    window = 4
    function = attention(window)
    q, k, v = cases.qkv(length=T)
    state = function.init_state((B,), K, D, V, max_length=10**6)
    _, state = cases.compiled(function.prefill)(state, q, k, v)
    assert isinstance(state.far, LinearAttentionState)
    assert state.near.key.shape == (B, window, K, D) and state.near.value.shape == (B, window, K, V)
    for position in range(T - window, T):
        np.testing.assert_array_equal(state.near.key[:, position % window], k[:, position])
    # Its keys weigh as much as those of a state that saw only what has left the window.
    plain = make_fast_softmax_attention(nb_features=cases.M, unidirectional=True)
    empty = plain.init_state((B,), K, D, V)
    left = (x[:, : T - window] for x in (q, k, v))
    _, expected = cases.compiled(plain.prefill)(empty, *left)
    kv, k_sum = cases.true_state(state.far)
    cases.assert_close((kv, k_sum), cases.true_state(expected), 1e-5)


def test_gradients_flow_through_the_state():
    function = attention(3)
    q, k, v = cases.qkv(length=9)

    def split(q, k, v):
        state = function.init_state((B,), K, D, V)
        first, state = function.prefill(state, *(x[:, :4] for x in (q, k, v)))
        second, state = function.prefill(state, *(x[:, 4:8] for x in (q, k, v)))
        last, _ = function.step(state, q[:, 8], k[:, 8], v[:, 8])
        return cases.weighted_sum(jnp.concatenate([first, second, last[:, None]], 1))

    whole = lambda q, k, v: cases.weighted_sum(function(q, k, v))  # noqa: E731
    gradient = functools.partial(jax.grad, argnums=(0, 1, 2))
    actual = cases.compiled(gradient(split))(q, k, v)
    cases.assert_close(actual, cases.compiled(gradient(whole))(q, k, v), 2e-5)
