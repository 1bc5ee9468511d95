"""Laws of token shift: it looks one position back, and never across a start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.layers.token_shift import last_visible, shift_tokens, starts_of_runs


def test_half_of_the_channels_move_on_by_one():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7))
    shifted = shift_tokens(x)
    np.testing.assert_array_equal(shifted[..., :4], x[..., :4])
    np.testing.assert_array_equal(shifted[:, 1:, 4:], x[:, :-1, 4:])
    np.testing.assert_array_equal(shifted[:, 0, 4:], 0)


def test_a_sequence_cut_in_two_is_shifted_as_a_whole():
    x = jax.random.normal(jax.random.key(0), (2, 9, 6))
    whole = shift_tokens(x)
    left, right = shift_tokens(x[:, :4]), shift_tokens(x[:, 4:], before=x[:, 3])
    np.testing.assert_array_equal(jnp.concatenate([left, right], 1), whole)


def test_packed_sequences_are_shifted_as_if_alone():
    x = jax.random.normal(jax.random.key(0), (1, 9, 6))
    ids = jnp.array([[1, 1, 1, 2, 2, 3, 3, 3, 3]])
    packed = shift_tokens(x, starts=starts_of_runs(ids, None))
    alone = [shift_tokens(x[:, a:b]) for a, b in ((0, 3), (3, 5), (5, 9))]
    np.testing.assert_array_equal(packed, jnp.concatenate(alone, 1))


def test_padding_on_the_left_is_not_seen():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4))
    mask = jnp.array([[False, False, True, True, True, True], [True] * 6])
    shifted = shift_tokens(x, starts=starts_of_runs(None, mask))
    np.testing.assert_array_equal(shifted[0, 2:], shift_tokens(x[:1, 2:])[0])
    np.testing.assert_array_equal(shifted[1], shift_tokens(x[1:])[0])


def test_last_visible_position_of_ragged_rows():
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    before = jnp.ones((3, 2))
    mask = jnp.array([[True, True, False, False], [False, True, True, True], [False] * 4])
    expected = jnp.stack([x[0, 1], x[1, 3], before[2]])
    np.testing.assert_array_equal(last_visible(x, mask, before), expected)
    np.testing.assert_array_equal(last_visible(x, None, before), x[:, -1])
