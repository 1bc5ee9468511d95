"""Laws of efficient attention against its definition, one query and one head at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import efficient_attention, make_efficient_attention
from tests.layers.definitions import compiled

B, T, H, K, D, V = 2, 13, 4, 2, 5, 3


def draw(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def qkv(length=T, keys=None, batch=(B,), dtype=jnp.float32, scale=1.0):
    keys = keys or length
    return (
        jnp.asarray(draw(0, *batch, length, H, D, scale=scale), dtype),
        jnp.asarray(draw(1, *batch, keys, K, D, scale=scale), dtype),
        jnp.asarray(draw(2, *batch, keys, K, V), dtype),
    )


def soft(x, axis):
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def definition(query, key, value, visible=None, *, causal=False, blindspot_size=1, scale=1.0):
    """`[B, T, H, V]` float64; query t of row b sees the keys where `visible[b, t]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads = query.shape[:3]
    keys = key.shape[1]
    shown = np.ones((batch, length, keys), bool) if visible is None else visible
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for b, t, h in np.ndindex(batch, length, heads):
        end = keys if not causal else t + 1
        if blindspot_size > 1:
            end = t // blindspot_size * blindspot_size
        seen = [s for s in range(end) if shown[b, t, s]]
        if not seen:
            continue
        q, k, v = query[b, t, h], key[b, seen, h // 2], value[b, seen, h // 2]
        if causal:
            weights = soft((q + k).ravel(), 0).reshape(k.shape)
        else:
            weights = scale * soft(q, 0) * soft(k, 0)
        out[b, t, h] = weights.sum(1) @ v
    return out


def quadratic(query, key, value, shown, causal):
    """The definition once more with arrays, to differentiate; `shown` is `[B, T, S]`."""
    key, value = (jnp.repeat(x, H // K, axis=2) for x in (key, value))
    seen = shown[:, :, :, None, None]
    logs = jnp.where(seen, key[:, None], -1e30)
    if causal:
        logs = logs + query[:, :, None]
        logs = jnp.where(seen, logs, -1e30)
        weights = jnp.exp(logs - logs.max((2, 4), keepdims=True)) * seen
        total = weights.sum((2, 4), keepdims=True)
    else:
        weights = jnp.exp(logs - logs.max(2, keepdims=True)) * seen
        total = weights.sum(2, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    if not causal:
        weights = weights * jax.nn.softmax(query, -1)[:, :, None]
    return jnp.einsum("btshd,bshv->bthv", weights, value)


def close(actual, expected, tolerance=3e-6):
    assert np.isfinite(np.asarray(actual, np.float64)).all()
    np.testing.assert_allclose(actual, expected, rtol=tolerance * 10, atol=tolerance)


def with_gradients(function, *arrays):
    """The output and its gradients, from one program."""

    @compiled
    @functools.partial(jax.grad, argnums=tuple(range(len(arrays))), has_aux=True)
    def gradient(*arrays):
        out = function(*arrays)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    gradients, out = gradient(*arrays)
    return out, gradients


FORMS = {
    "both_ways": {},
    "scaled": {"scale_queries": True},
    "causal": {"causal": True},
    "buckets_of_3": {"causal": True, "blindspot_size": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(form):
    options = dict(FORMS[form])
    out = compiled(functools.partial(efficient_attention, **options))(*qkv())
    scale = D**-0.5 if options.pop("scale_queries", False) else 1.0
    close(out, definition(*qkv(), scale=scale, **options))
    if options.get("blindspot_size"):
        assert not out[:, : options["blindspot_size"]].any()


def sight(options, key_mask=None, ids=None):
    """Who sees whom, `[B, T, T]`."""
    shown = np.ones((B, T, T), bool)
    n = options.get("blindspot_size", 1)
    t, s = np.arange(T)[:, None], np.arange(T)
    if options.get("causal"):
        shown &= s <= t if n == 1 else s < t // n * n
    if key_mask is not None:
        shown &= key_mask[:, None]
    if ids is not None:
        runs = np.cumsum(np.diff(ids, prepend=ids[:, :1]) != 0, axis=1)
        shown &= runs[:, :, None] == runs[:, None]
    return shown


RAGGED = np.array([[True] * 9 + [False] * 4, [False, False, True, False, *[True] * 9]])
IDS = np.array([[7] * 6 + [5] * 1 + [7] * 6, [1] * 13])


@pytest.mark.parametrize(
    ("form", "restricted"),
    [
        ("both_ways", "mask"),
        ("both_ways", "segments"),
        ("causal", "mask"),
        ("causal", "segments"),
        ("buckets_of_3", "mask"),
    ],
)
def test_values_and_gradients_with_hidden_keys_and_segments(form, restricted):
    """Hidden keys hold what would spoil everything, and get no gradient."""
    options, arrays = FORMS[form], qkv()
    spoiled = jnp.asarray(RAGGED)[:, :, None, None]
    extra = {"key_mask": jnp.asarray(RAGGED)}
    shown = sight(options, RAGGED)
    if restricted == "segments":
        extra["segment_ids"] = jnp.asarray(IDS)
        shown = sight(options, RAGGED, IDS)

    def attend(query, key, value):
        key, value = (jnp.where(spoiled, x, jnp.nan) for x in (key, value))
        return efficient_attention(query, key, value, **options, **extra)

    expected = functools.partial(quadratic, shown=shown, causal=bool(options.get("causal")))
    with jax.enable_x64(True):
        doubles = [jnp.asarray(x, jnp.float64) for x in arrays]
        wanted, wanted_gradients = with_gradients(expected, *doubles)
    if not options.get("causal"):
        close(wanted, definition(*arrays, shown))
    out, gradients = with_gradients(attend, *arrays)
    close(out, wanted)
    for actual, gradient in zip(gradients, wanted_gradients, strict=True):
        close(actual, gradient, 1e-5)


@pytest.mark.parametrize(("length", "size"), [(1, 2), (12, 4)])
def test_buckets_of_any_length(length, size):
    options = {"causal": True, "blindspot_size": size}
    out = compiled(functools.partial(efficient_attention, **options))(*qkv(length))
    close(out, definition(*qkv(length), **options))


@pytest.mark.parametrize("form", ["both_ways", "causal", "buckets_of_3"])
def test_no_keys_no_batch_many_batches_and_low_precision(form):
    attend = functools.partial(efficient_attention, **FORMS[form])
    arrays = qkv(7, batch=(2, 3))

    @compiled
    def three_ways(*arrays):
        low = attend(*(x.astype(jnp.bfloat16) for x in arrays))
        return attend(*arrays), attend(*(x[1, 2] for x in arrays)), low

    out, one, low = three_ways(*arrays)
    close(one, out[1, 2])
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), out, atol=0.04)
    nothing = functools.partial(attend, key_mask=jnp.zeros((2, 3, 7), bool))
    none, gradients = with_gradients(nothing, *arrays)
    assert not none.any() and not any(x.any() for x in gradients)


@pytest.mark.parametrize(
    ("form", "scale"), [("both_ways", 100.0), ("causal", 15.0), ("buckets_of_3", 100.0)]
)
def test_large_inputs_stay_right(form, scale):
    arrays = qkv(scale=scale)
    attend = functools.partial(efficient_attention, **FORMS[form])
    out, gradients = with_gradients(attend, *arrays)
    close(out, definition(*arrays, **FORMS[form]), 1e-4)
    assert all(np.isfinite(x).all() for x in gradients)


def test_huge_inputs_stay_finite_and_among_the_values():
    arrays = qkv(scale=100.0)
    out, gradients = with_gradients(functools.partial(efficient_attention, causal=True), *arrays)
    assert np.abs(out).max() <= np.abs(arrays[2]).max() * (1 + 1e-6)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("form", ["both_ways", "buckets_of_3"])
def test_float64_is_honoured(form):
    with jax.enable_x64(True):
        arrays = qkv(dtype=jnp.float64)
        out = compiled(functools.partial(efficient_attention, **FORMS[form]))(*arrays)
        assert out.dtype == jnp.float64
        close(out, definition(*arrays, **FORMS[form]), 1e-12)


@pytest.mark.parametrize("form", ["causal", "buckets_of_3"])
def test_the_future_leaves_the_past_bit_equal(form):
    attend = compiled(functools.partial(efficient_attention, **FORMS[form]))
    later = (jnp.arange(T) > 6)[None, :, None, None]
    arrays = qkv()
    changed = attend(*(jnp.where(later, x * 1e4, x) for x in arrays))
    np.testing.assert_array_equal(changed[:, :7], attend(*arrays)[:, :7])


def test_a_bias_is_a_factor_on_the_weights_of_a_key():
    query, key, value = qkv()
    bias = draw(5, B, T).astype(np.float32)
    bias[:, 3] = -1e9
    shown = np.broadcast_to((bias > -1e4)[:, None], (B, T, T))
    moved = np.asarray(key) + np.clip(bias, -1e4, None)[:, :, None, None]
    for form in ("both_ways", "buckets_of_3"):
        attend = compiled(functools.partial(efficient_attention, **FORMS[form]))
        out = attend(query, key, value, key_bias=jnp.asarray(bias))
        close(out, definition(query, moved, value, shown, **FORMS[form]), 1e-5)


def test_raw_queries_are_weights_of_either_sign():
    query, key, value = qkv(keys=9)
    weights = soft(np.asarray(key, np.float64), 1)
    summary = np.repeat(np.einsum("bskd,bskv->bkdv", weights, value), H // K, axis=1)
    expected = np.einsum("bthd,bhdv->bthv", query, summary)
    close(efficient_attention(query, key, value, normalize_queries=False), expected)


@pytest.mark.parametrize(("size", "padded_left"), [(1, True), (3, True), (3, False)])
def test_prefill_and_steps_are_the_whole(size, padded_left):
    attention = make_efficient_attention(unidirectional=True, blindspot_size=size)
    arrays = qkv()
    whole = compiled(attention)(*arrays)
    lengths, prompt = (5, 3), 5
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
    # A second prompt of two tokens finds the buckets filled unequally, then come single tokens.
    rest = [jnp.stack([row[n : n + 8] for row, n in zip(x, lengths, strict=True)]) for x in arrays]
    out, state = compiled(attention.prefill)(state, *(x[:, :2] for x in rest))
    step = compiled(attention.step)
    tokens = [out[:, 0], out[:, 1]]
    for t in range(2, 8):
        before = jax.tree.map(jnp.shape, state)
        out, state = step(state, *(x[:, t] for x in rest))
        assert jax.tree.map(jnp.shape, state) == before
        tokens.append(out)
    for row, n in enumerate(lengths):
        close(jnp.stack(tokens, 1)[row], whole[row, n : n + 8])


def test_is_an_attention_function_of_flax():
    x = jnp.asarray(draw(0, 2, 7, 8), jnp.float32)
    padding = jnp.broadcast_to(jnp.arange(7) < 5, (2, 7))

    def layer(attention_fn):
        return nnx.MultiHeadAttention(
            2, 8, attention_fn=attention_fn, decode=False, keep_rngs=False, rngs=nnx.Rngs(0)
        )

    def expected(query, key, value, **_):
        return efficient_attention(
            query, key, value, causal=True, blindspot_size=3, key_mask=padding
        )

    mask = nnx.combine_masks(
        nnx.make_attention_mask(padding, padding), nnx.make_causal_mask(padding)
    )
    out = layer(make_efficient_attention(blindspot_size=3))(x, mask=mask, is_causal=True)
    close(out, layer(expected)(x))


def test_dropout_takes_whole_keys_and_scales_the_others():
    arrays = qkv()
    attention = make_efficient_attention()
    rng = jax.random.key(0)
    out = attention(*arrays, dropout_rng=rng, dropout_rate=0.5)
    keep = jax.random.bernoulli(rng, 0.5, (1, T, 1, 1))
    close(out, attention(*arrays[:2], jnp.where(keep, 2 * arrays[2], 0)))
    close(attention(*arrays, dropout_rate=0.5, deterministic=True), attention(*arrays))
    with pytest.raises(ValueError, match="needs a dropout_rng"):
        attention(*arrays, dropout_rate=0.5)


def test_one_query_over_a_cache_sees_what_the_mask_shows():
    query, key, value = qkv()
    attention = make_efficient_attention(unidirectional=True)
    shown = jnp.broadcast_to(jnp.arange(T) < 6, (B, T))
    out = attention(query[:, 5:6], key, value, mask=shown[:, None, None])
    close(out, attention(query, key, value)[:, 5:6])


def test_several_axes_are_one_length():
    arrays = [x.reshape(B, 3, 4, *x.shape[2:]) for x in qkv(12)]
    attention = make_efficient_attention(scale_queries=True)
    out = attention(*arrays, axis=(1, 2))
    close(out.reshape(B, 12, H, V), attention(*qkv(12)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blindspot_size": 0}, "blindspot_size must be at least 1, got 0"),
        ({"blindspot_size": 2}, "bidirectional attention was requested"),
        ({"causal": True, "normalize_queries": False}, "divides by the sum"),
        (
            {"causal": True, "blindspot_size": 2, "segment_ids": jnp.zeros((B, T), int)},
            "start at multiples of it, not at segments",
        ),
        ({"key_mask": jnp.ones((B, T, K + 1), bool)}, "key_mask and key_bias must have shape"),
        ({"key_mask": jnp.ones((T,), bool)}, "key_mask and key_bias must have shape"),
    ],
)
def test_what_cannot_be_done_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        efficient_attention(*qkv(), **options)


def test_functions_refuse_what_they_cannot_honour():
    arrays = qkv()
    with pytest.raises(ValueError, match="blindspot_size must be a positive whole number"):
        make_efficient_attention(blindspot_size=0)
    attention = make_efficient_attention(True, 4)
    with pytest.raises(ValueError, match="no random features"):
        attention(*arrays, projection=jnp.ones((3, D)))
    with pytest.raises(ValueError, match="decode with init_state"):
        attention(arrays[0][:, :1], *arrays[1:])
    assert attention.draw_projection(jax.random.key(0), D) is None
    assert hash(attention) == hash(make_efficient_attention(True, 4))
