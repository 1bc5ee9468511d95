"""Laws of hashed attention; buckets come from the function itself and are checked on their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import LSHOutput, lsh_attention, shared_qk_attention
from fast_attention.mechanisms.call import Dropout
from fast_attention.mechanisms.lsh.hashed import n_buckets
from tests.mechanisms.lsh.definition import attend, meetings

KEY = jax.random.key(5)


def hashed(qk, value, where=KEY, **options):
    """Output, weights and buckets."""
    small = {"bucket_size": 4, "n_hashes": 2}
    return lsh_attention(qk, value, where, return_buckets=True, **{**small, **options})


def attention(*arrays, **options):
    return hashed(*arrays, **options).out


def inputs(length, heads=2, batch=(1,), width=6, value_heads=None):
    random = np.random.default_rng(length)
    qk = random.standard_normal((*batch, length, heads, width), np.float32)
    value = random.standard_normal((*batch, length, value_heads or heads, 3), np.float32)
    return jnp.asarray(qk), jnp.asarray(value)


def value_and_gradients(function, *arrays):
    def loss(*arrays):
        found = function(*arrays)
        out = found.out if isinstance(found, LSHOutput) else found
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), found

    gradients, found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*arrays)
    return found, *gradients


@pytest.mark.parametrize(
    ("length", "options", "given"),
    [
        (32, {"n_hashes": 3}, 0),
        (16, {"n_hashes": 1, "causal": True, "scale": 1.0}, 0),
        (29, {"causal": True, "value_heads": 1}, 5),
        (3, {"causal": True}, 0),
        (24, {"allow_duplicate_attention": False, "causal": True}, 0),
        (24, {"allow_duplicate_attention": False, "n_hashes": 1}, 0),
        (24, {"allow_duplicate_attention": False, "count_across_rounds": False}, 0),
        (
            24,
            {
                "allow_duplicate_attention": False,
                "attend_across_buckets": False,
                "random_rotations_per_head": True,
            },
            0,
        ),
        (24, {"rehash_each_round": False, "attend_across_buckets": False}, 0),
    ],
)
def test_equals_the_definition_with_its_gradients(length, options, given):
    qk, value = inputs(length, value_heads=options.pop("value_heads", None))
    queries, causal = length - given, options.get("causal", False)
    call = functools.partial(hashed, query_length=queries, **options)
    found, *gradients = value_and_gradients(call, qk, value)
    buckets = np.asarray(found.buckets)[0]
    # What fills the length up stands behind all buckets and is seen by nobody.
    full = 4 * n_buckets(length, 4)
    behind = np.full((*buckets.shape[:2], full - length), n_buckets(length, 4))
    buckets = np.concatenate([buckets, behind], axis=-1)
    place = np.arange(length)
    visible = np.full((length, length), True)
    if causal:
        visible = (place[:, None] >= place) | (place >= queries)
    across = options.get("attend_across_buckets", True)
    discount = not options.get("allow_duplicate_attention", True)
    borders = options.get("count_across_rounds", True)

    def expected(qk, value):
        rows = []
        for h in range(2):
            found = meetings(buckets[h], 4, across=across, borders=borders)
            met, counted = (x[:length, :length] for x in found)
            v = value[0, :, h % value.shape[2]]
            counted = counted if discount else None
            scale = options.get("scale")
            rows.append(attend(qk[0, :, h], v, met, counted, visible=visible, scale=scale))
        return jnp.stack(rows, axis=1)[None, :queries]

    with jax.enable_x64():
        wanted = value_and_gradients(expected, *(jnp.asarray(x, jnp.float64) for x in (qk, value)))
    for a, b in zip((found.out, *gradients), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_more_rounds_come_closer_to_exact_attention():
    """Also where pairs count once: those that meet across the border of two rounds, too."""
    qk, value = inputs(64)
    exact = shared_qk_attention(qk, value)
    call = functools.partial(attention, qk, value, allow_duplicate_attention=False)
    few, more, many = (np.abs(call(n_hashes=n) - exact).mean() for n in (1, 4, 16))
    assert many < more < few


def test_two_chunks_are_exact_attention():
    qk, value = inputs(16, batch=(2,))
    random = np.random.default_rng(0)
    options = {
        "causal": True,
        "query_length": 11,
        "mask": jnp.asarray((random.random((2, 1, 11, 16)) < 0.8) | np.eye(11, 16, dtype=bool)),
        "key_mask": jnp.asarray(random.random((2, 16)) < 0.8),
        "return_weights": True,
    }
    found = hashed(qk, value, bucket_size=8, n_hashes=1, **options, rotary=True)
    exact = shared_qk_attention(qk, value, **options, rotary=True)
    np.testing.assert_allclose(found.out, exact.out, atol=2e-6)
    np.testing.assert_allclose(found.weights, exact.weights, atol=2e-6)


def test_weights_times_values_is_the_output():
    qk, value = inputs(21)
    found = hashed(qk, value, n_hashes=3, causal=True, return_weights=True)
    product = jnp.einsum("bhts,bshv->bthv", found.weights, value)
    np.testing.assert_allclose(product, found.out, atol=2e-6)
    np.testing.assert_allclose(found.weights.sum(-1), 1, rtol=1e-5)


def test_no_gradient_reaches_the_future():
    qk, value = inputs(24)

    def loss(qk, value):
        return attention(qk, value, causal=True)[:, :9].sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(qk, value):
        assert not gradient[:, 9:].any()
        assert gradient[:, :8].any(axis=(0, 2, 3)).all()


def test_padding_changes_nothing_and_gets_no_gradient():
    qk, value = inputs(21, batch=(2,))
    seen = jnp.asarray(np.random.default_rng(3).random((2, 21)) < 0.7)
    shown = seen[:, :, None, None]

    def attend(qk, value):
        return attention(qk, value, key_mask=seen)

    plain = value_and_gradients(attend, qk, value)
    garbage = value_and_gradients(
        attend, jnp.where(shown, qk, jnp.nan), jnp.where(shown, value, jnp.inf)
    )
    for a, b in zip(plain, garbage, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not jnp.where(shown, 0, a).any()
    # Where masked positions keep their places, each sees itself alone.
    kept = attention(qk, value, key_mask=seen, hash_masked=True)
    own = np.broadcast_to(value, kept.shape)
    np.testing.assert_array_equal(np.where(shown, 0, kept), np.where(shown, 0, own))


def test_a_key_or_buckets_decide_all_chance():
    qk, value = inputs(40)
    call = functools.partial(hashed, qk, value)
    first = call(KEY)
    np.testing.assert_array_equal(first.out, call(KEY).out)
    assert jnp.abs(first.out - call(jax.random.key(6)).out).max() > 1e-3
    np.testing.assert_array_equal(first.out, attention(qk, value, first.buckets))
    # Hashing is of directions, dropping features before it changes them.
    dropped = call(drop_for_hash_rate=0.5, dropout=Dropout(KEY, 0.0, True))
    assert (dropped.buckets != first.buckets).any()


def test_pieces_change_no_row():
    qk, value = inputs(24, batch=(2, 2))
    whole = attention(qk, value)
    np.testing.assert_allclose(attention(qk, value, attn_chunks=3), whole, atol=1e-6)


def test_dropout_scales_what_it_keeps_and_its_gradient_agrees():
    qk, value = inputs(24)

    def attend(qk, value):
        return attention(qk, value, dropout=Dropout(KEY, 0.4, False))

    # The weights of a row sum to one on average.
    sums = attend(qk, jnp.ones_like(value))
    assert abs(sums.mean() - 1) < 0.2 and jnp.std(sums) > 0.1
    out, d_qk, d_value = value_and_gradients(attend, qk, value)
    cotangent = jnp.cos(jnp.arange(out.size).reshape(out.shape))
    np.testing.assert_allclose(jnp.vdot(value, d_value), jnp.vdot(out, cotangent), rtol=1e-4)
    # The norm of a query scales its logits only, and stretching no vector moves a bucket.
    step = 1e-2
    ends = [jnp.vdot(attend(qk * (1 + s), value), cotangent) for s in (step, -step)]
    slope = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(qk, d_qk), slope, rtol=1e-2, atol=1e-3)


def test_half_precision_stays_finite():
    qk, value = (100 * x.astype("bfloat16") for x in inputs(20))
    qk = qk.at[0, 3].set(0)
    for x in value_and_gradients(functools.partial(attention, causal=True), qk, value):
        assert x.dtype == "bfloat16" and jnp.isfinite(x).all()


def test_rows_that_see_nothing_but_themselves_are_exact():
    qk, value = inputs(16)
    out = attention(qk, value, n_hashes=5, causal=True)
    np.testing.assert_allclose(out[:, 0], value[:, 0], rtol=1e-6)
    out = attention(qk, value, n_hashes=5, causal=True, allow_duplicate_attention=False)
    np.testing.assert_allclose(out[:, 0], value[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_length": 30}, "query_length=30"),
        ({"drop_for_hash_rate": 0.1}, "needs dropout"),
        ({"drop_for_hash_rate": 1.0}, "below 1"),
        (
            {"rehash_each_round": False, "allow_duplicate_attention": False},
            "rehash_each_round=True",
        ),
        ({"positions": jnp.zeros((1, 12), int)}, "rotary=True"),
        ({"key_mask": jnp.ones((1, 11), bool)}, "key_mask must have shape"),
        ({"mask": jnp.ones((3, 1, 12, 12), bool)}, "broadcastable"),
        ({"where": jnp.ones((1, 6, 3, 2))}, "rotations must be"),
        ({"where": jnp.ones((1, 6, 2, 3))}, "half of the buckets"),
        ({"where": jnp.ones((1, 2, 3, 12), int)}, "buckets must have shape"),
        ({"n_hashes": 0}, "n_hashes must be a positive whole number"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*inputs(12), **options)


def test_an_array_unless_more_is_requested():
    qk, value = inputs(16)
    found = lsh_attention(qk, value, KEY, causal=True, bucket_size=4, n_hashes=2)
    np.testing.assert_array_equal(found, attention(qk, value, causal=True))
    with pytest.raises(TypeError, match="rounds"):
        lsh_attention(qk, value, KEY, rounds=2)
