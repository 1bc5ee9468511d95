"""Strided attention against one call for every class of positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import (
    make_efficient_attention,
    make_fast_softmax_attention,
    make_strided_attention,
    strided_attention,
)
from fast_attention.softmax_attention import make_softmax_attention
from tests.layers.definitions import compiled

B, T, H, K, D, V, W = 2, 13, 4, 2, 4, 3, 4


def qkv(length=T):
    random = np.random.default_rng(0)
    shapes = ((B, length, H, D), (B, length, K, D), (B, length, K, V))
    return tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def definition(attention, arrays, options=(), start=0, stop=None):
    """One call for every row and class, of the positions `start..stop` alone, hidden ones out."""
    query, key, value = (np.asarray(x) for x in arrays)
    key_mask = dict(options).get("key_mask", np.ones(query.shape[:2], bool))
    stop = query.shape[1] if stop is None else stop
    out = np.zeros((*query.shape[:-1], V), np.float32)
    for b in range(B):
        for first in range(start, min(start + W, stop)):
            where = np.arange(first, stop, W)
            mask = jnp.asarray(key_mask[b, where])
            out[b, where] = attention(
                query[b, where], key[b, where], value[b, where], key_mask=mask
            )
    return out


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=5e-6)


HIDDEN = np.arange(T) % 5 != np.array([[1], [3]])


@pytest.mark.parametrize("length", [1, 8, T])
def test_every_class_attends_by_itself(length):
    attention = make_softmax_attention(unidirectional=length % 2 == 0)
    strided = functools.partial(strided_attention, attention, stride=W)
    close(compiled(strided)(*qkv(length)), definition(attention, qkv(length)))


def test_hidden_keys_and_gradients():
    attention = make_softmax_attention()
    shown = jnp.asarray(HIDDEN)[:, :, None, None]

    def loss(query, key, value, strided):
        attend = functools.partial(strided_attention, attention, stride=W)
        if not strided:

            def attend(query, key, value, key_mask):
                t = np.arange(T)
                same = (t[:, None] % W == t % W)[None, None]
                return attention(query, key, value, mask=same & key_mask[:, None, None])

        key, value = (jnp.where(shown, x, 1e4) for x in (key, value))
        out = attend(query, key, value, key_mask=jnp.asarray(HIDDEN))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (actual, out), (wanted, expected) = gradient(*qkv(), True), gradient(*qkv(), False)
    close(out, expected)
    for x, y in zip(actual, wanted, strict=True):
        close(x, y)


def test_segments_are_separate_calls():
    """Runs of the same id meet in a class only if the second does not start anew."""
    ids = jnp.broadcast_to(jnp.asarray([3] * 5 + [1] * 1 + [3] * 7), (B, T))
    attention = make_softmax_attention(unidirectional=True)
    out = compiled(make_strided_attention(attention, W))(*qkv(), segment_ids=ids)
    for start, stop in ((0, 5), (5, 6), (6, T)):
        expected = definition(attention, qkv(), start=start, stop=stop)
        close(out[:, start:stop], expected[:, start:stop])


@pytest.mark.parametrize("causal", [False, True])
def test_masks_are_of_keys(causal):
    attention = make_softmax_attention()
    padding = HIDDEN[:, None, :, None] & HIDDEN[:, None, None]
    mask = padding & np.tri(T, dtype=bool) if causal else padding
    strided = make_strided_attention(attention, W)
    out = strided(*qkv(), mask=mask, is_causal=causal)
    inner = functools.partial(attention, is_causal=causal)
    close(out, definition(inner, qkv(), {"key_mask": HIDDEN}))


def test_the_future_leaves_the_past_bit_equal():
    attend = compiled(make_strided_attention(make_efficient_attention(True), W))
    later = (jnp.arange(T) > 6)[None, :, None, None]
    changed = attend(*(jnp.where(later, x * 1e4, x) for x in qkv()))
    np.testing.assert_array_equal(changed[:, :7], attend(*qkv())[:, :7])


@pytest.mark.parametrize(
    ("inner", "padded_left"),
    [
        (make_softmax_attention(True), False),
        (make_efficient_attention(True, blindspot_size=2), True),
    ],
)
def test_prefill_and_steps_are_the_whole(inner, padded_left):
    attention = make_strided_attention(inner, 3)
    assert attention.unidirectional
    arrays = qkv()
    whole = compiled(attention)(*arrays)
    lengths, prompt = (6, 4), 6
    visible = np.stack([np.arange(prompt) < n for n in lengths])
    visible = visible[:, ::-1] if padded_left else visible
    index = np.clip(np.cumsum(visible, 1) - 1, 0, None)[:, :, None, None]

    def padded(x):
        taken = jnp.take_along_axis(x, index, axis=1)
        return jnp.where(visible[:, :, None, None], taken, 77.0)

    state = attention.init_state((B,), K, D, V, max_length=T)
    out, state = compiled(attention.prefill)(
        state, *(padded(x) for x in arrays), key_mask=jnp.asarray(visible)
    )
    for row, n in enumerate(lengths):
        close(out[row][visible[row]], whole[row, :n])
    step = compiled(attention.step)
    for t in range(7):
        token = [jnp.stack([row[n + t] for row, n in zip(x, lengths, strict=True)]) for x in arrays]
        out, state = step(state, *token)
        for row, n in enumerate(lengths):
            close(out[row], whole[row, n + t])


def test_projections_are_handed_on():
    inner = make_fast_softmax_attention(nb_features=8, unidirectional=True)
    attention = make_strided_attention(inner, W)
    drawn = jax.eval_shape(lambda: attention.draw_projection(jax.random.key(3), D))
    assert drawn.shape == (8, D)
    rows = jnp.asarray(np.random.default_rng(3).normal(size=drawn.shape), jnp.float32)
    folded = [x.reshape(B, 2, W, *x.shape[2:]).swapaxes(1, 2) for x in qkv(8)]
    expected = compiled(inner)(*folded, projection=rows).swapaxes(1, 2).reshape(B, 8, H, V)
    close(compiled(attention)(*qkv(8), projection=rows), expected)
    state = attention.init_state((B,), K, D, V)
    out, _ = compiled(attention.prefill)(state, *qkv(8), projection=rows)
    close(out, expected)


def test_what_cannot_be_done_says_why():
    query, key, value = qkv()
    attention = make_strided_attention(make_softmax_attention(), W)
    with pytest.raises(ValueError, match="stride must be a positive whole number, got 0"):
        make_strided_attention(make_softmax_attention(), 0)
    with pytest.raises(ValueError, match="13 queries and 5 keys"):
        attention(query, key[:, :5], value[:, :5])
    with pytest.raises(ValueError, match="bias must be None for strided attention"):
        attention(query, key, value, bias=jnp.zeros((1, 1, 1, T)))
    mask = jnp.arange(H)[:, None, None] == jnp.zeros((1, 1, T), int)
    with pytest.raises(ValueError, match="share a key head"):
        attention(query, key, value, mask=mask[None])
    with pytest.raises(TypeError, match="cannot decode"):
        make_strided_attention(jax.nn.dot_product_attention, W).init_state((), K, D, V)
