"""Losses against log-probabilities looked up token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.models import Transformer, TransformerConfig, cross_entropy, next_token_loss
from tests.layers.definitions import compiled, draw, filled

V = 7
CONFIG = TransformerConfig(V, 8, 2, None, 1, 8, 12, 16, positions="rotary")
MODEL = filled(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))
# Two sequences alone, padded and packed.
LONG, SHORT = [3, 1, 4, 1, 5], [2, 6, 5]


def test_cross_entropy_is_the_mean_over_what_counts():
    logits, targets = draw(2, 3, V), np.array([[1, -7, 6], [99, 0, 3]])
    counts = np.array([[True, False, True], [False, True, True]])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [-np.log(probabilities[i, t, targets[i, t]]) for i, t in np.argwhere(counts)]
    loss, number = cross_entropy(logits, targets, counts)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)
    assert number == 4

    def nothing(logits):
        return cross_entropy(logits, targets, np.zeros_like(counts))[0]

    value, gradient = jax.value_and_grad(nothing)(logits)
    assert value == 0 and not gradient.any()


def test_the_loss_of_a_text_is_the_same_padded_left_and_right_and_packed():
    whole = compiled(MODEL)

    def by_hand(text):
        # What follows changes nothing.
        logits = np.asarray(jax.nn.log_softmax(whole(np.array([text + [0] * (5 - len(text))]))[0]))
        return [-logits[t, token] for t, token in enumerate(text[1:])]

    expected = by_hand(LONG) + by_hand(SHORT)
    places = [0, 1, 2, 3, 4]
    short = [0, 1, 2]

    @compiled
    def run(tokens, key_mask, segment_ids, positions):
        arguments = {"key_mask": key_mask, "segment_ids": segment_ids, "positions": positions}
        return next_token_loss(MODEL, tokens, **arguments)

    right = run(
        np.array([LONG, [*SHORT, -1, 99]]),
        np.array([[True] * 5, [True] * 3 + [False] * 2]),
        np.ones((2, 5), int),
        np.array([places, places]),
    )
    left = run(
        np.array([LONG, [-1, 3, *SHORT]]),
        np.array([[True] * 5, [False] * 2 + [True] * 3]),
        np.ones((2, 5), int),
        np.array([places, [0, 0, *short]]),
    )
    packed = run(
        np.array([LONG + SHORT]),
        np.ones((1, 8), bool),
        np.array([[1] * 5 + [2] * 3]),
        np.array([places + short]),
    )
    # Behind a sequence, a token that is not to be predicted needs no mask.
    ignored = compiled(lambda tokens: next_token_loss(MODEL, tokens, ignore_index=-100))(
        np.array([LONG, [*SHORT, -100, -100]])
    )
    for loss, number in (right, left, packed, ignored):
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
        assert number == 6


def test_a_text_of_one_token_has_no_loss():
    for tokens in (jnp.ones((2, 1), int), jnp.ones(4, int)):
        with pytest.raises(ValueError, match=r"length >= 2\], got"):
            next_token_loss(MODEL, tokens)
