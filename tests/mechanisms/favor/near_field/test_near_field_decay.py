"""A near field whose keys decay, near and far, against its definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention, make_softmax_attention
from fast_attention.feature_maps import PositiveFeatures
from fast_attention.mechanisms.favor.near_field import near_field_attention
from tests.linear import cases
from tests.mechanisms.favor.near_field.definition import near_field

B, H, K, D, V = cases.B, cases.H, cases.K, cases.D, cases.V
MAP = PositiveFeatures(4)
CHUNK, WINDOW = 3, 2
ROWS = cases.draw(9, 4, D)
near = cases.with_plan(near_field_attention)


def attend(q, k, v, log_decay, bias=None, **options):
    return near(
        q,
        k,
        v,
        **{"exact_window": WINDOW, "chunk_size": CHUNK} | options,
        feature_map=MAP,
        parameters=jnp.asarray(ROWS, jnp.promote_types(q.dtype, jnp.float32)),
        causal=True,
        key_bias=bias,
        log_decay=log_decay,
    )


def defined(q, k, v, log_decay, bias=None, *, window=WINDOW, mask=None, segments=None):
    rows = jnp.asarray(ROWS, q.dtype)
    return near_field(q, k, v, rows, bias, window, True, mask, segments, log_decay=log_decay)


def decays(length, most=20.0):
    """Some tokens keep everything, some forget nearly everything."""
    rng = np.random.default_rng(length)
    return -most * rng.random((B, length, K)) * (rng.random((B, length, K)) < 0.5)


def arrays(length, most=20.0):
    return *cases.qkv(length=length, dtype=jnp.float64), jnp.asarray(decays(length, most))


def with_gradients(function):
    def loss(arrays):
        out = function(*arrays)
        return cases.weighted_sum(out), out

    return cases.compiled(jax.grad(loss, has_aux=True))


def check(function, definition, operands, tolerance=1e-10):
    found = with_gradients(function)(operands)
    cases.assert_close(found, with_gradients(definition)(operands), tolerance)


@functools.cache
def pulled(function, **options):
    """Compiles the outputs and the gradients of a function for a cotangent."""

    def both(operands, cotangent):
        out, pull = jax.vjp(functools.partial(function, **options), *operands)
        return out, pull(cotangent)

    return cases.compiled(both)


@pytest.mark.parametrize(
    ("length", "window"), [(1, 2), (CHUNK - 1, 2), (CHUNK, 2), (CHUNK + 1, 2), (11, 2), (11, 12)]
)
def test_values_and_gradients(length, window):
    """The first rows of the definition for 11 tokens are those for fewer."""
    with jax.enable_x64(True):
        operands, cotangent = arrays(11), cases.draw(3, B, 11, H, V)
        seen = (np.arange(11) < length)[:, None, None]
        expected = pulled(defined, window=window)(operands, np.where(seen, cotangent, 0))
        first = functools.partial(jax.tree.map, lambda x: x[:, :length])
        found = pulled(attend, exact_window=window)(first(operands), first(cotangent))
        cases.assert_close(found, first(expected), 1e-10)


@pytest.mark.parametrize(
    ("length", "options"), [(13, {"saved_states": "few"}), (8, {"implementation": "reference"})]
)
def test_values_and_gradients_with_everything_at_once(length, options):
    """Hidden tokens in front, inside and behind, biases, and segments."""
    mask = np.ones((B, length), bool)
    mask[0, [0, 1, 5, 6, length - 1]] = False
    mask[1, 3:7] = False
    segments = np.stack([np.arange(length) >= 4, np.arange(length) >= 2]).astype(int)
    with jax.enable_x64(True):
        check(
            functools.partial(
                attend, key_mask=jnp.asarray(mask), segment_ids=jnp.asarray(segments), **options
            ),
            functools.partial(defined, mask=mask, segments=segments),
            (*arrays(length, most=2.0), jnp.asarray(cases.draw(2, B, length))),
        )


def test_one_decay_a_head_in_float32():
    """In a chunk as long as users have them, of decays that sum to hundreds."""
    operands = *cases.qkv(length=37), jnp.asarray([-12.0, -0.03])
    found = with_gradients(functools.partial(attend, chunk_size=16, exact_window=5))(operands)
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.asarray(x, float)) for x in operands)
        expected = with_gradients(functools.partial(defined, window=5))(wide)
        cases.assert_close(found, expected, 3e-5)


def test_the_gradient_of_strong_decays_in_bfloat16():
    """It is not lost in the rounding of the weights of a row."""
    q, k, v = cases.qkv(length=72, dtype=jnp.bfloat16, scale=1.0)
    log_decay = np.asarray(-8 * np.random.default_rng(0).random((B, 72, K)), np.float32)
    options = {"chunk_size": 16, "exact_window": 8}

    def gradient(function, log_decay, *qkv):
        loss = lambda log_decay: cases.weighted_sum(function(*qkv, log_decay))  # noqa: E731
        return np.asarray(cases.compiled(jax.grad(loss))(log_decay), float)

    found = gradient(functools.partial(attend, **options), jnp.asarray(log_decay), q, k, v)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, float)) for x in (log_decay, q, k, v))
        expected = gradient(functools.partial(defined, window=8), *wide)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.02


def test_no_decay_is_none():
    """In a call, and in a state that could decay."""
    operands = cases.qkv(length=5)

    @cases.compiled
    def ways(*operands):
        function = function_of(WINDOW)
        state = function.init_state((B,), K, D, V, decays=True)
        read, _ = function.prefill(state, *operands)
        return (attend(*operands, jnp.zeros(K)), read), (attend(*operands, None),) * 2

    cases.assert_close(*ways(*operands), 1e-6)


def test_later_tokens_change_no_bit_and_what_was_forgotten_leaves_no_trace():
    q, k, v = cases.qkv(length=36)
    log_decay = jnp.full((B, 36, K), -0.01).at[:, 5:30].set(-jnp.inf)
    attended = cases.compiled(functools.partial(attend, chunk_size=16, exact_window=4))
    first = attended(q, k, v, log_decay)
    second = attended(q, k.at[:, 33:].mul(9), v.at[:, 33:].mul(9), log_decay.at[:, 33:].add(-7))
    np.testing.assert_array_equal(first[:, :33], second[:, :33])
    with jax.enable_x64(True):
        wide = (np.asarray(x[:, 29:], float) for x in (q, k, v, log_decay.at[:, 29].set(0)))
        expected = defined(*wide, window=4)
    cases.assert_close(first[:, 29:], expected, 1e-5)


def function_of(window):
    return make_fast_softmax_attention(
        projection_matrix=jnp.asarray(ROWS, jnp.float32),
        unidirectional=True,
        exact_window=window,
        chunk_size=CHUNK,
    )


def test_prefill_and_steps_are_the_whole():
    """Values, gradients and the last state; padding stands about the tokens of the prompt.

    The window is longer than the prompt, and shorter than the whole.
    """
    window = 6
    function = function_of(window)
    shown = np.array([False, True, True, False, True, True, True, False])
    place = np.maximum(np.cumsum(shown) - 1, 0)
    mask = jnp.broadcast_to(jnp.asarray(shown), (B, 8))

    def read(state, *operands, **options):
        return function.prefill(state, *operands[:3], log_decay=operands[3], **options)

    def empty():
        return function.init_state((B,), K, D, V, decays=True)

    def split(*operands):
        def hidden(x):
            return jnp.where(shown.reshape(-1, *(1,) * (x.ndim - 2)), x[:, place], jnp.nan)

        def one(state, token):
            out, state = function.step(state, *token[:3], log_decay=token[3])
            return state, out

        prompt, state = read(empty(), *map(hidden, operands), key_mask=mask)
        more, state = read(state, *(x[:, 5:7] for x in operands))
        tokens = [jnp.moveaxis(x[:, 7:], 1, 0) for x in operands]
        state, rest = jax.lax.scan(one, state, tokens)
        return jnp.concatenate([prompt[:, shown], more, jnp.moveaxis(rest, 0, 1)], 1), state

    def loss(operands):
        out, state = split(*operands)
        return cases.weighted_sum(out), (out, state, read(empty(), *operands)[1])

    operands = *cases.qkv(length=11), jnp.asarray(decays(11, most=2.0), jnp.float32)
    gradients, (out, state, whole) = cases.compiled(jax.grad(loss, has_aux=True))(operands)
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.asarray(x, float)) for x in operands)
        expected = with_gradients(functools.partial(defined, window=window))(wide)
        cases.assert_close((gradients, out), expected, 3e-5)
    cases.assert_close(cases.true_state(state.far), cases.true_state(whole.far), 1e-5)
    cases.assert_close(state.near, whole.near, 1e-5)


def test_refusals():
    function, (q, k, v) = function_of(3), cases.qkv(length=4)
    log_decay = jnp.zeros((B, 4, K))
    state = function.init_state((B,), K, D, V)
    assert state.near.decayed is None
    with pytest.raises(ValueError, match="decays=True"):
        function.prefill(state, q, k, v, log_decay=log_decay)
    with pytest.raises(ValueError, match="decays=True"):
        function.step(state, q[:, 0], k[:, 0], v[:, 0], log_decay=log_decay[:, 0])
    with pytest.raises(ValueError, match="one query over a cache"):
        function(q[:, :1], k, v, log_decay=log_decay)
    with pytest.raises(ValueError, match="causal=True"):
        make_fast_softmax_attention(nb_features=4, exact_window=2)(q, k, v, log_decay=log_decay)
    with pytest.raises(ValueError, match="decays must be False"):
        make_softmax_attention(True).init_state((B,), K, D, V, 4, decays=True)
