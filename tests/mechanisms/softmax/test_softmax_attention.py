"""Laws of exact attention; the definition below is what every block size must reproduce."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from fast_attention.mechanisms.softmax.blocks import (
    Choices,
    Extras,
    Tiling,
    blocked_attention,
    run_bounds,
)
from fast_attention.softmax_attention import make_softmax_attention
from tests.leaks import checking_leaks

# Several rows at a time, several blocks within several causal stages.
SMALL = Tiling(rows=400, block=300, smallest=4)


@jax.jit
def definition(query, key, value, *, visible=True, bias=0.0):
    """softmax(q k / sqrt(D) + bias) v over the visible keys, zeros where there are none."""
    group = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    scores = jnp.einsum("...thd,...shd->...hts", query, key) / np.sqrt(query.shape[-1])
    scores = scores + jnp.broadcast_to(bias, scores.shape)
    weights = jnp.where(jnp.broadcast_to(visible, scores.shape), jnp.exp(scores), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("...hts,...shv->...thv", weights / jnp.where(total > 0, total, 1), value)


def inputs(*batch, length=11, keys=None, heads=4, kv_heads=4, width=6, value_width=5):
    keys = length if keys is None else keys
    random = np.random.default_rng(0)
    shapes = (
        (*batch, length, heads, width),
        (*batch, keys, kv_heads, width),
        (*batch, keys, kv_heads, value_width),
    )
    return tuple(jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes)


def tril(length):
    return np.tri(length, dtype=bool)


def close(actual, expected, tolerance=2e-6):
    np.testing.assert_allclose(actual, expected, rtol=tolerance * 10, atol=tolerance)


def gradients(function, *args):
    @functools.partial(jax.grad, argnums=tuple(range(len(args))))
    def gradient(*args):
        out = function(*args)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    return jax.jit(gradient)(*args)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "causal"), [((), 1, True), ((3,), 4, False), ((2, 3), 2, True)]
)
def test_equals_the_definition_with_its_gradients(batch, kv_heads, causal):
    arrays = inputs(*batch, kv_heads=kv_heads)
    attention = make_softmax_attention(causal)
    expected = functools.partial(definition, visible=tril(11) if causal else True)
    close(attention(*arrays), expected(*arrays))
    for actual, wanted in zip(
        gradients(attention, *arrays), gradients(expected, *arrays), strict=True
    ):
        close(actual, wanted, 1e-5)


@pytest.mark.parametrize(
    ("length", "tiling", "causal"),
    [
        (1, SMALL, True),
        (13, Tiling(rows=1, block=1, smallest=3), True),
        (13, Tiling(rows=1, block=1, smallest=3), False),
        (12, Tiling(rows=10**6, block=1, smallest=2), True),
        (12, Tiling(rows=2 * 12 * 4 * 2, block=10**6, smallest=4), False),
    ],
)
@pytest.mark.parametrize("restricted", [False, True])
def test_no_tiling_changes_a_value(length, tiling, causal, restricted):
    arrays = inputs(3, length=length, heads=2, kv_heads=1)
    random = np.random.default_rng(length)
    key_mask = random.random((3, length)) < (0.7 if restricted else 1)
    ids = np.cumsum(random.random((3, length)) < 0.2, axis=1) * restricted
    visible = (key_mask[:, None, :] & (ids[:, :, None] == ids[:, None, :]))[:, None]
    if causal:
        visible = visible & tril(length)[None, None]
    extras = Extras()
    if restricted:
        first, last = run_bounds(jnp.asarray(ids))
        extras = Extras(key_mask=jnp.asarray(key_mask), first_key=first, last_key=last)
    out = blocked_attention(*arrays, extras, Choices(causal), tiling=tiling)
    close(out, definition(*arrays, visible=visible))


@pytest.mark.parametrize("shape", [(7, 7), (3, 4, 1, 7), (3, 1, 7, 1)])
def test_masks_and_biases_of_any_shape(shape):
    arrays = inputs(3, length=7, kv_heads=2)
    tiling = Tiling(rows=1, block=4 * 7 * 3, smallest=3)
    random = np.random.default_rng(1)
    mask = jnp.asarray(random.random(shape) < 0.6)
    bias = jnp.asarray(random.standard_normal(shape, np.float32))

    def attend(bias, *arrays):
        return blocked_attention(*arrays, Extras(bias, mask), Choices(False), tiling=tiling)

    def expected(bias, *arrays):
        return definition(*arrays, visible=mask, bias=bias)

    close(attend(bias, *arrays), expected(bias, *arrays))
    for actual, wanted in zip(
        gradients(attend, bias, *arrays), gradients(expected, bias, *arrays), strict=True
    ):
        close(actual, wanted, 1e-5)
    number_mask = make_softmax_attention()(*arrays, mask=mask.astype(jnp.float32))
    close(number_mask, definition(*arrays, visible=mask))


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_jax_at_a_length_of_many_blocks(causal):
    query, key, value = inputs(2, length=331, heads=2, kv_heads=2, width=8, value_width=8)
    attention = make_softmax_attention(causal)
    expected = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    close(attention(query, key, value), expected(query, key, value))
    for actual, wanted in zip(
        gradients(attention, query, key, value),
        gradients(expected, query, key, value),
        strict=True,
    ):
        close(actual, wanted, 2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tiling", [None, SMALL])
def test_the_future_leaves_the_past_bit_equal(dtype, tiling):
    arrays = [x.astype(dtype) for x in inputs(2, length=23)]
    later = jnp.arange(23)[None, :, None, None] > 9
    changed = [jnp.where(later, x * 1e4, x) for x in arrays]
    attend = functools.partial(
        blocked_attention, extras=Extras(), choices=Choices(True), tiling=tiling
    )
    before, after = attend(*arrays), attend(*changed)
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert not np.array_equal(before[:, 10:], after[:, 10:])


def test_a_masked_key_is_as_if_it_were_not_there():
    query, key, value = inputs(2)
    key_mask = jnp.broadcast_to(jnp.arange(11)[None] < 7, (2, 11))
    attention = make_softmax_attention()
    masked = functools.partial(attention, key_mask=key_mask)
    close(masked(query, key, value), attention(query, key[:, :7], value[:, :7]))
    dq, dk, dv = gradients(masked, query, key, value)
    tq, tk, tv = gradients(attention, query, key[:, :7], value[:, :7])
    close(dq, tq, 1e-5)
    close(dk[:, :7], tk, 1e-5)
    close(dv[:, :7], tv, 1e-5)
    assert not dk[:, 7:].any() and not dv[:, 7:].any()


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    arrays = inputs(2)
    attend = functools.partial(make_softmax_attention(), key_mask=jnp.zeros((2, 11), bool))
    assert not attend(*arrays).any()
    for gradient in gradients(attend, *arrays):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_segments_are_separate_calls(causal):
    arrays = inputs(2, length=12)
    ids = jnp.broadcast_to(jnp.asarray([4] * 5 + [2] * 1 + [4] * 6)[None], (2, 12))
    attention = make_softmax_attention(causal)
    pieces = [attention(*(x[:, s] for x in arrays)) for s in np.split(np.arange(12), [5, 6])]
    close(attention(*arrays, segment_ids=ids), jnp.concatenate(pieces, axis=1))


@pytest.mark.parametrize("axis", [1, -4, 2, (1, 2), (2, 1)])
def test_axes_are_flattened_in_row_major_order(axis):
    arrays = inputs(2, 3, length=4, heads=2, kv_heads=2, width=5)
    attention = make_softmax_attention(unidirectional=True)
    out = attention(*arrays, axis=axis)
    if axis in (1, -4):
        moved = [jnp.swapaxes(x, 1, 2) for x in arrays]
        expected = jnp.swapaxes(attention(*moved), 1, 2)
    elif axis == 2:
        expected = attention(*arrays)
    else:
        flat = [x.reshape(2, 12, 2, 5) for x in arrays]
        expected = attention(*flat).reshape(2, 3, 4, 2, 5)
    close(out, expected)


def test_the_mask_alone_decides_for_one_query_over_a_cache():
    query, key, value = inputs(2, length=1, keys=9)
    mask = (jnp.arange(9) < 4)[None, None, None]
    out = make_softmax_attention()(query, key, value, mask=mask, is_causal=True)
    close(out, make_softmax_attention()(query, key[:, :4], value[:, :4]))


def test_low_precision_inputs_are_summed_in_float32():
    arrays = inputs(2, length=64, heads=2, kv_heads=2)
    exact = make_softmax_attention(True)(*arrays)
    out = make_softmax_attention(True)(*(x.astype(jnp.bfloat16) for x in arrays))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
    assert make_softmax_attention()(*arrays, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_memory_does_not_grow_with_the_square_of_the_length():
    def temporary_bytes(length):
        arrays = inputs(1, length=length, heads=2, kv_heads=2, width=16, value_width=16)
        attend = functools.partial(
            blocked_attention,
            extras=Extras(),
            choices=Choices(causal=False),
            tiling=Tiling(rows=1, block=2 * 64 * 2048, smallest=64),
        )
        gradient = jax.jit(functools.partial(gradients, attend))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(4096)
    assert long < 4096 * 4096 * 4 / 4
    assert long < 3 * short


class TestDropout:
    def test_keeps_the_mean_and_scales_what_is_kept(self):
        query, key, value = inputs(1, length=4, heads=1, kv_heads=1)
        attend = functools.partial(
            make_softmax_attention(), query, key, value, dropout_rate=0.25, broadcast_dropout=False
        )
        keys = jax.random.split(jax.random.key(0), 4000)
        samples = jax.vmap(lambda key: attend(dropout_rng=key))(keys)
        error = jnp.std(samples, axis=0) / np.sqrt(len(keys))
        exact = attend(deterministic=True)
        assert (jnp.abs(samples.mean(0) - exact) < 5 * error).all()
        assert (error > 0).all()

    @pytest.mark.parametrize("broadcast", [False, True])
    def test_is_shared_by_batch_and_heads_on_request(self, broadcast):
        query, key, value = (jnp.broadcast_to(x[:1, :, :1], x.shape) for x in inputs(3))
        out = make_softmax_attention()(
            query,
            key,
            value,
            broadcast_dropout=broadcast,
            dropout_rng=jax.random.key(0),
            dropout_rate=0.5,
        )
        assert np.allclose(out, out[:1, :, :1], atol=1e-6) == broadcast

    def test_needs_a_key(self):
        with pytest.raises(ValueError, match="needs a dropout_rng"):
            make_softmax_attention()(*inputs(2), dropout_rate=0.5)


class TestCache:
    def test_prefill_and_steps_are_the_whole(self):
        query, key, value = inputs(2, kv_heads=2)
        attention = make_softmax_attention()
        state = attention.init_state((2,), 2, 6, 5, max_length=13)
        prefill, step = jax.jit(attention.prefill), jax.jit(attention.step)
        parts = []
        for start, stop in ((0, 4), (4, 7)):
            piece = [x[:, start:stop] for x in (query, key, value)]
            out, state = prefill(state, *piece)
            parts.append(out)
        for t in range(7, 11):
            out, state = step(state, query[:, t], key[:, t], value[:, t])
            parts.append(out[:, None])
        expected = make_softmax_attention(unidirectional=True)(query, key, value)
        close(jnp.concatenate(parts, axis=1), expected)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_on_either_side_is_not_there(self, side):
        query, key, value = inputs(1, length=7)
        pad = (3, 0) if side == "left" else (0, 3)
        padded = [
            jnp.pad(x[:, :6], ((0, 0), pad, (0, 0), (0, 0)), constant_values=50.0)
            for x in (query, key, value)
        ]
        mask = jnp.pad(jnp.ones((1, 6), bool), ((0, 0), pad))
        attention = make_softmax_attention()
        state = attention.init_state((1,), 4, 6, 5, max_length=10)
        out, state = attention.prefill(state, *padded, key_mask=mask)
        expected = make_softmax_attention(True)(query, key, value)
        close(out[mask], expected[0, :6])
        out, _ = attention.step(state, query[:, 6], key[:, 6], value[:, 6])
        close(out, expected[:, 6])

    def test_overflow_is_an_error_or_nan_but_never_a_wrong_number(self):
        query, key, value = inputs(2, length=4)
        attention = make_softmax_attention()
        empty = attention.init_state((2,), 4, 6, 5, max_length=3)
        with pytest.raises(ValueError, match="larger max_length"):
            attention.prefill(empty, query, key, value)
        _, state = attention.prefill(empty, *(x[:, :3] for x in (query, key, value)))
        with pytest.raises(ValueError, match="larger max_length"):
            attention.step(state, query[:, 3], key[:, 3], value[:, 3])
        out, _ = jax.jit(attention.step)(state, query[:, 3], key[:, 3], value[:, 3])
        assert jnp.isnan(out).all()
        with pytest.raises(ValueError, match="max_length must be the number of tokens"):
            attention.init_state((2,), 4, 6, 5)


@pytest.mark.parametrize("host", ["nnx", "linen"])
def test_takes_the_place_of_dot_product_attention_in_flax(host):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    mask = nnx.make_causal_mask(jnp.ones((2, 9)))

    def run(attention_fn):
        if host == "nnx":
            module = nnx.MultiHeadAttention(
                2, 8, attention_fn=attention_fn, decode=False, keep_rngs=False, rngs=nnx.Rngs(0)
            )
            return module(x, mask=mask)
        module = flax.linen.MultiHeadDotProductAttention(2, attention_fn=attention_fn)
        variables = module.init(jax.random.key(0), x)
        return module.apply(variables, x, mask=mask)

    reference = nnx if host == "nnx" else flax.linen
    close(run(make_softmax_attention()), run(reference.dot_product_attention))


def test_leaks_no_tracer_under_jit_grad_vmap_and_remat():
    arrays = inputs(2, length=9)
    attention = make_softmax_attention(True)
    with checking_leaks():
        batched = jax.jit(jax.vmap(jax.checkpoint(attention)))
        close(batched(*arrays), attention(*arrays))
        jax.jit(functools.partial(gradients, attention))(*arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": jnp.ones((3, 6))}, "no random features"),
        ({"input_positions": jnp.arange(11)}, "apply rotary positions"),
        ({"module": object()}, "attention weights are not computed"),
        (
            {"qk_attn_weights_einsum": jnp.einsum},
            "qk_attn_weights_einsum must be None",
        ),
        ({"mask": jnp.ones((3, 11), bool)}, "mask must be broadcastable"),
        ({"key_mask": jnp.ones((2, 10), bool)}, r"key_mask must be of shape \(2, 11\)"),
        (
            {"segment_ids": jnp.ones((2, 10), int)},
            r"segment_ids must .* got shape \(2, 10\)",
        ),
        ({"segment_ids": jnp.ones(11, int)}, r"segment_ids must be of shape \(2, 11\)"),
        ({"axis": 2}, "axis must name"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        make_softmax_attention()(*inputs(2), **options)


def test_shapes_that_do_not_fit_are_errors(monkeypatch):
    # Outside the tests nothing but our own checks stands between a shape and the user.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    query, key, value = inputs(2)
    attend = make_softmax_attention()
    with pytest.raises(ValueError, match="a multiple of that of key/value heads"):
        attend(query, key[..., :3, :], value[..., :3, :])
    with pytest.raises(ValueError, match="same width"):
        attend(query, key[..., :3], value)
    with pytest.raises(ValueError, match="Lengths of causal attention must be equal"):
        attend(query[:, :5], key, value, is_causal=True)
    with pytest.raises(ValueError, match="self-attention"):
        attend(query[:, :5], key, value, segment_ids=jnp.ones((2, 5), jnp.int32))
