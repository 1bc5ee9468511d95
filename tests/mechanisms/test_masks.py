"""Which masks and biases linear attention takes, and what it makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.mechanisms.masks import Sizes, key_bias_from_bias, key_mask_from_mask, pair_mask

B, T, H, K = 2, 5, 4, 2
SIZES = Sizes((B,), T, T, H, K)
PADDING = np.array([[True] * 5, [True, True, True, False, False]])
KEYS = PADDING[:, None, None, :]
PAIRS = PADDING[:, None, :, None] & KEYS
CAUSAL = np.tril(np.ones((T, T), bool))


def keys_of(mask, *, causal=False, **changes):
    keys, fits = key_mask_from_mask(jnp.asarray(mask), SIZES._replace(**changes), causal=causal)
    assert fits is None
    return np.asarray(keys)


@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        KEYS,
        PAIRS,
        np.broadcast_to(KEYS, (B, H, 1, T)),
        np.broadcast_to(PAIRS, (B, H, T, T)),
        np.broadcast_to(KEYS, (B, 1, T, T)),
    ],
    ids=["keys", "pairs", "keys per head", "pairs per head", "repeated"],
)
def test_padding_in_every_form(mask, causal, dtype):
    keys = keys_of(mask.astype(dtype), causal=causal)
    assert keys.dtype == bool
    np.testing.assert_array_equal(keys, np.broadcast_to(PADDING[..., None], keys.shape))


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL & KEYS, CAUSAL & PAIRS])
def test_a_causal_factor_needs_causal_attention(mask):
    seen = PADDING if mask.ndim == 4 else np.ones((B, T), bool)
    np.testing.assert_array_equal(keys_of(mask, causal=True)[..., 0], seen)
    with pytest.raises(ValueError, match="unidirectional=True"):
        keys_of(mask)


def test_heads_may_differ_where_they_share_no_keys():
    per_head = np.random.default_rng(0).random((B, K, 1, T)) < 0.5
    mask = np.repeat(per_head, H // K, axis=1)
    np.testing.assert_array_equal(keys_of(mask).swapaxes(1, 2), per_head[:, :, 0])
    mask[0, 0, 0, 0] ^= True
    with pytest.raises(ValueError, match="share a key head"):
        keys_of(mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((T, T + 1), bool), r"broadcastable to .* = \(2, 4, 5, 5\), got shape \(5, 6\)"),
        (np.ones((1, B, H, T, T), bool), "broadcastable"),
        (np.random.default_rng(0).random((T, T)) < 0.5, "is not supported"),
        (np.triu(np.ones((T, T), bool)), "is not supported"),
        (np.where(CAUSAL, 0.0, -1e9), "additive mask goes into bias"),
        (np.eye(T, dtype=bool), "is not supported|unidirectional"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_refused(mask, message, causal):
    with pytest.raises(ValueError, match=message):
        keys_of(mask, causal=causal)


def test_one_query_over_a_cache():
    mask = np.arange(T) < 3
    keys = keys_of(mask[None, None, None], num_queries=1)
    np.testing.assert_array_equal(keys[..., 0], np.broadcast_to(mask, (B, T)))


MASKS = {
    "keys": KEYS,
    "pairs": PAIRS,
    "causal": np.broadcast_to(CAUSAL, (B, 1, T, T)),
    "causal pairs": CAUSAL & PAIRS,
    "window": np.broadcast_to(CAUSAL & ~np.tri(T, k=-2, dtype=bool), (B, 1, T, T)),
    "future": np.broadcast_to(CAUSAL.T, (B, 1, T, T)),
    "one row": np.where(np.arange(B)[:, None, None, None] == 0, PAIRS, CAUSAL),
    "additive": np.where(PAIRS, 0.0, -1e9),
    "one head": np.where(np.arange(H)[:, None, None] == 1, KEYS, True),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_a_traced_mask_is_checked_in_the_program_as_a_concrete_one_is(name, causal):
    """By row of the batch, where a concrete mask raises for all."""
    find = jax.jit(lambda mask: key_mask_from_mask(mask, SIZES, causal=causal))
    _, fits = find(MASKS[name])
    fits = np.broadcast_to(True if fits is None else fits, B)
    for row in range(B):
        try:
            keys_of(MASKS[name][row : row + 1], causal=causal, batch_shape=(1,))
            expected = True
        except ValueError:
            expected = False
        assert fits[row] == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [512, 515])
def test_long_traced_masks_are_checked_as_short_ones_are(causal, length):
    """They are compared in blocks of rows and groups of keys, with a rest of each."""
    keys = np.random.default_rng(0).random(length) < 0.7
    keys[[0, 200, -1]] = True
    good = keys[None] & (np.tri(length, dtype=bool) if causal else np.ones((length, 1), bool))
    good[[0, 99, 300]] = False
    padded, hidden, all_hidden = good.copy(), good.copy(), np.zeros_like(good)
    padded[-150:] = False
    hidden[:, 200] = False
    wrong = []
    for row, key in ((7, 0), (length - 1, 200), (257, length - 1), (256, 255)):
        bad = good.copy()
        bad[row, key] = not bad[row, key]
        wrong.append(bad)
    masks = np.stack([good, padded, hidden, all_hidden, keys[None] & good[:, :1], *wrong])[:, None]
    sizes = Sizes((len(masks),), length, length, 1, 1)
    found, fits = jax.jit(lambda mask: key_mask_from_mask(mask, sizes, causal=causal))(masks)
    np.testing.assert_array_equal(fits, np.arange(len(masks)) < 5)
    np.testing.assert_array_equal(found[0, :, 0], keys)
    for row, mask in enumerate(masks[:4]):
        concrete = Sizes((1,), length, length, 1, 1)
        np.testing.assert_array_equal(
            found[row : row + 1], key_mask_from_mask(mask[None], concrete, causal=causal)[0]
        )


def test_numbers_other_than_0_and_1_are_no_mask_of_pairs():
    additive = np.where(PAIRS, 0.0, -1e9)
    with pytest.raises(ValueError, match="an additive mask goes into bias"):
        pair_mask(additive, SIZES)
    _, fits = jax.jit(lambda mask: pair_mask(mask, SIZES))(additive * np.array([[[[0]]], [[[1]]]]))
    np.testing.assert_array_equal(fits, [True, False])


def test_bias_constant_over_queries():
    bias = np.random.default_rng(0).normal(size=(B, 1, 1, T)).astype(np.float32)
    bias[0, 0, 0, 2] = -np.inf
    for given in (bias, np.broadcast_to(bias, (B, H, T, T))):
        values = key_bias_from_bias(jnp.asarray(given), SIZES)
        np.testing.assert_array_equal(
            np.broadcast_to(values, (B, T, K)), np.repeat(bias[:, 0, 0, :, None], K, -1)
        )


def test_bias_that_depends_on_the_query():
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(T, T)))
    with pytest.raises(ValueError, match="depends on the query"):
        key_bias_from_bias(bias, SIZES)
    with pytest.raises(ValueError, match="depends on the query"):
        jax.jit(lambda bias: key_bias_from_bias(bias, SIZES))(bias)
    with pytest.raises(ValueError, match="bias must be broadcastable"):
        key_bias_from_bias(bias[:, :3], SIZES)
