"""Laws of local attention as an attention function: hosts, caches, and decoding with a ring."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import LocalAttention, make_local_attention
from tests.mechanisms.local.test_op import LENGTH, close, definition, inputs, local, visible

WINDOW = 3
CAUSAL = make_local_attention(WINDOW, unidirectional=True)
DECODERS = (
    CAUSAL,
    make_local_attention(WINDOW, look_backward=2, exact_window=True),
    make_local_attention(WINDOW, shared_qk=True),
    make_local_attention(WINDOW, look_backward=0),
)
decoders = pytest.mark.parametrize("attention", DECODERS, ids=["", "exact", "shared", "own_block"])


@functools.partial(jax.jit, static_argnums=0)
def whole(attention, *arrays):
    return attention(*arrays, is_causal=True)


@functools.partial(jax.jit, static_argnums=0)
def prefill(attention, *args, **options):
    return attention.prefill(*args, **options)


@functools.partial(jax.jit, static_argnums=0)
def step(attention, *args):
    return attention.step(*args)


def test_options_reach_the_operation():
    arrays = inputs(2)
    options = {"look_backward": 2, "look_forward": 0, "exact_window": True, "shared_qk": True}
    attention = make_local_attention(WINDOW, **options)
    ids = jnp.arange(LENGTH)[None] // 6 + jnp.zeros((2, 1), int)
    key_mask = jnp.ones((2, LENGTH), bool).at[1, 4:7].set(False)
    out = attention(*arrays, segment_ids=ids, key_mask=key_mask)
    expected = local(*arrays, window_size=WINDOW, segment_ids=ids, key_mask=key_mask, **options)
    np.testing.assert_array_equal(out, expected)
    assert hash(attention) == hash(make_local_attention(WINDOW, **options))


def test_masks_and_biases_of_flax_are_honoured_exactly():
    arrays = inputs(2)
    random = np.random.default_rng(1)
    mask = random.random((2, 1, LENGTH, LENGTH)) < 0.7
    bias = jnp.asarray(random.standard_normal((4, LENGTH, LENGTH)).astype(np.float32))
    out = jax.jit(make_local_attention(WINDOW))(*arrays, bias, mask.astype(np.float32))
    seen = visible(LENGTH, WINDOW) & mask
    close(out, definition(*arrays, seen=seen, bias=bias))


def test_several_axes_are_one_in_row_major_order():
    arrays = inputs(2, length=12)
    grid = [x.reshape(2, 3, 4, *x.shape[2:]) for x in arrays]
    out = whole(functools.partial(CAUSAL, axis=(1, 2)), *grid)
    np.testing.assert_array_equal(out.reshape(2, 12, 4, 5), whole(CAUSAL, *arrays))


def test_dropout_is_asked_for_as_in_flax():
    attend = jax.jit(functools.partial(CAUSAL, dropout_rate=0.5), static_argnames="deterministic")
    arrays, key = inputs(2), jax.random.key(0)
    exact = whole(CAUSAL, *arrays)
    np.testing.assert_array_equal(attend(*arrays, deterministic=True), exact)
    assert np.max(np.abs(attend(*arrays, dropout_rng=key) - exact)) > 0.1
    one = [x[:, -1:] if i == 0 else x for i, x in enumerate(arrays)]
    assert np.max(np.abs(attend(*one, dropout_rng=key) - exact[:, -1:])) > 0.1
    with pytest.raises(ValueError, match="needs a dropout_rng"):
        attend(*arrays)


@pytest.mark.parametrize("attention", DECODERS[1:3], ids=["exact", "shared"])
def test_one_query_over_a_cache_stands_at_the_last_key_in_sight(attention):
    query, key, value = inputs(2)
    expected = whole(attention, query, key, value)

    @jax.jit
    def at(position):
        mask = jnp.arange(LENGTH)[None, None, None] <= position
        one = jax.lax.dynamic_slice_in_dim(query, position, 1, axis=1)
        return attention(one, key, value, mask=mask, is_causal=True)

    for position in (0, 5, LENGTH - 1):
        close(at(position), expected[:, position : position + 1])
    np.testing.assert_array_equal(at(-1), 0)


class TestDecoding:
    @decoders
    def test_prefills_and_steps_are_the_whole(self, attention):
        arrays = inputs(2, length=17)
        state = attention.init_state((2,), 2, 6, 5)
        parts = []
        for start, stop in ((0, 7), (7, 14)):
            out, state = prefill(attention, state, *(x[:, start:stop] for x in arrays))
            parts.append(out)
        for t in range(14, 17):
            out, state = step(attention, state, *(x[:, t] for x in arrays))
            parts.append(out[:, None])
        close(jnp.concatenate(parts, axis=1), whole(attention, *arrays))
        slots = WINDOW * (attention.look_backward + 1)
        assert state.key.shape == (2, slots, 2, 6) and state.value.shape == (2, slots, 2, 5)
        np.testing.assert_array_equal(state.length, 17)

    def test_steps_alone_are_the_whole(self):
        arrays = inputs(length=17)

        def one(state, token):
            out, state = CAUSAL.step(state, *token)
            return state, out

        _, out = jax.jit(lambda x: jax.lax.scan(one, CAUSAL.init_state((), 2, 6, 5), x))(arrays)
        close(out, whole(CAUSAL, *arrays))

    def test_padding_takes_no_place(self):
        """Rows of 2, 9 and no tokens, padded left and right; then more of them; then steps."""
        arrays = inputs(3, length=17)
        random = np.random.default_rng(2)
        lengths, state = np.zeros(3, int), CAUSAL.init_state((3,), 2, 6, 5)
        expected = np.asarray(whole(CAUSAL, *arrays))
        arrays = [np.asarray(x) for x in arrays]
        for counts in ((2, 9, 0), (9, 1, 4)):
            places = [np.sort(random.permutation(9)[:count]) for count in counts]
            kept = np.zeros((3, 9), bool)
            padded = [np.full((3, 9, *x.shape[2:]), 50.0, np.float32) for x in arrays]
            for row, place in enumerate(places):
                kept[row, place] = True
                for x, given in zip(padded, arrays, strict=True):
                    x[row, place] = given[row, lengths[row] : lengths[row] + len(place)]
            out, state = prefill(CAUSAL, state, *padded, key_mask=jnp.asarray(kept))
            out = np.asarray(out)
            for row, place in enumerate(places):
                stop = lengths[row] + len(place)
                close(out[row, place], expected[row, lengths[row] : stop])
            lengths += counts
        np.testing.assert_array_equal(state.length, lengths)
        for _ in range(3):
            token = [x[np.arange(3), lengths] for x in arrays]
            out, state = step(CAUSAL, state, *token)
            close(out, expected[np.arange(3), lengths])
            lengths += 1

    def test_padding_gets_no_gradient(self):
        arrays = inputs(length=6)
        kept = jnp.arange(6) < 4

        def loss(*arrays):
            out, state = CAUSAL.prefill(CAUSAL.init_state((), 2, 6, 5), *arrays, key_mask=kept)
            return jnp.sum(out**2) + jnp.sum(state.key**2) + jnp.sum(state.value**2)

        for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays):
            assert jnp.abs(gradient[:4]).max() > 0
            np.testing.assert_array_equal(gradient[4:], 0)

    def test_low_precision(self):
        arrays = [x.astype(jnp.bfloat16) for x in inputs(2)]
        state = CAUSAL.init_state((2,), 2, 6, 5)
        out, state = prefill(CAUSAL, state, *(x[:, :12] for x in arrays))
        last, _ = step(CAUSAL, state, *(x[:, 12] for x in arrays))
        assert out.dtype == last.dtype == jnp.bfloat16
        joined = jnp.concatenate([out, last[:, None]], axis=1).astype(jnp.float32)
        np.testing.assert_allclose(joined, whole(CAUSAL, *arrays).astype(jnp.float32), atol=0.02)

    def test_looking_forward_cannot_be_decoded(self):
        with pytest.raises(ValueError, match="cannot look forward"):
            make_local_attention(WINDOW, look_forward=1).init_state((), 2, 6, 5)


class TestHosts:
    def test_decoding_in_nnx_is_the_whole(self):
        x = jax.random.normal(jax.random.key(0), (2, 8, 8))
        module = nnx.MultiHeadAttention(
            2, 8, attention_fn=CAUSAL, decode=False, keep_rngs=False, rngs=nnx.Rngs(0)
        )
        expected = nnx.jit(lambda module, x: module(x))(module, x)
        module.init_cache(x.shape)
        decode = nnx.jit(lambda module, token: module(token, decode=True))
        steps = [decode(module, x[:, t : t + 1]) for t in range(8)]
        close(jnp.concatenate(steps, axis=1), expected)

    def test_decoding_in_linen_is_the_whole(self):
        x = jax.random.normal(jax.random.key(0), (2, 8, 8))
        make = functools.partial(flax.linen.MultiHeadDotProductAttention, 2, attention_fn=CAUSAL)
        module = make(decode=True)
        variables = module.init(jax.random.key(0), x)
        expected = make().apply({"params": variables["params"]}, x)
        cache = variables["cache"]

        @jax.jit
        def decode(cache, token):
            out, changed = module.apply(
                {"params": variables["params"], "cache": cache}, token, mutable=["cache"]
            )
            return out, changed["cache"]

        for t in range(8):
            out, cache = decode(cache, x[:, t : t + 1])
            close(out, expected[:, t : t + 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": jnp.ones((3, 6))}, "no random features"),
        ({"input_positions": jnp.arange(LENGTH)}, "apply rotary positions"),
        ({"module": object()}, "sow_weights"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum must be None"),
        ({"key_mask": jnp.ones((2, 10), bool)}, "key_mask must be of shape"),
        ({"axis": 2}, "axis must name"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        CAUSAL(*inputs(2), **options)


def test_shapes_and_options_that_do_not_fit_are_errors():
    query, key, value = inputs(2)
    with pytest.raises(ValueError, match="self-attention"):
        CAUSAL(query[:, :5], key, value)
    with pytest.raises(ValueError, match="equal batch axes"):
        CAUSAL(query[:1, :1], key, value)
    with pytest.raises(ValueError, match="a multiple of that of key/value heads"):
        CAUSAL(query[:, :, :3], key, value)
    with pytest.raises(ValueError, match="mask the keys instead"):
        CAUSAL(query[:, :1], key, value, segment_ids=jnp.ones((2, 1), int))
    with pytest.raises(ValueError, match="cannot look forward"):
        LocalAttention(WINDOW, look_forward=1)(query, key, value, is_causal=True)
    with pytest.raises(ValueError, match="window_size"):
        make_local_attention(0)
