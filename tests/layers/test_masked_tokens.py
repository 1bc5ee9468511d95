"""Embeddings of masked tokens, against the formula row by row."""

import jax.numpy as jnp
import numpy as np

from fast_attention.layers.masked_tokens import drop_masked_tokens
from tests.layers.definitions import draw

B, T, M, RATE = 2, 6, 3, 0.12
MASKED = np.array([[0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]], bool)


def define(x, masked):
    """One sequence without padding."""
    share = masked.sum() / len(masked)
    return np.where(masked[:, None], 0, x * (1 - RATE) / max(1 - share, 1e-6))


def test_is_the_formula():
    x = draw(B, T, M)
    expected = [define(*row) for row in zip(x, MASKED, strict=True)]
    np.testing.assert_allclose(drop_masked_tokens(x, jnp.asarray(MASKED), RATE), expected, 1e-6)


def test_padding_is_not_counted():
    x, length = draw(B, T, M), 4
    visible = np.broadcast_to(np.arange(T) < length, (B, T))
    found = drop_masked_tokens(x, jnp.asarray(MASKED), RATE, key_mask=jnp.asarray(visible))
    short = drop_masked_tokens(x[:, :length], jnp.asarray(MASKED[:, :length]), RATE)
    np.testing.assert_allclose(found[:, :length], short, rtol=1e-6)


def test_segments_are_sequences_by_themselves():
    """A run of masked tokens alone is zero, and equal ids that do not touch are two runs."""
    x, ids = draw(B, T, M), np.array([[1, 1, 0, 0, 0, 1], [3, 3, 3, 1, 2, 2]])
    found = drop_masked_tokens(x, jnp.asarray(MASKED), RATE, segment_ids=jnp.asarray(ids))
    for row, stops in enumerate(([2, 5, 6], [3, 4, 6])):
        pieces = np.split(np.arange(T), stops[:-1])
        expected = [define(x[row, piece], MASKED[row, piece]) for piece in pieces]
        np.testing.assert_allclose(found[row], np.concatenate(expected), rtol=1e-6)
    assert not np.asarray(found[1, :3]).any()
