"""Laws of token shift: groups of channels move along the length, and never across a start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.layers.token_shift import last_visible, shift_tokens, starts_of_runs
from tests.layers import definitions
from tests.layers.definitions import draw

SHIFTS = [(0, 1), (1, 0), (-1, 0, 1), (2, -3)]


def test_half_of_the_channels_move_on_by_one():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    shifted = shift_tokens(x)
    np.testing.assert_array_equal(shifted[..., :3], x[..., :3])
    np.testing.assert_array_equal(shifted[:, 1:, 3:], x[:, :-1, 3:])
    np.testing.assert_array_equal(shifted[:, 0, 3:], 0)


@pytest.mark.parametrize("shifts", SHIFTS)
def test_groups_move_by_their_shifts_and_what_is_left_over_stays(shifts):
    x = draw(2, 5, 7)
    for length in (1, 2, 5):
        expected = [definitions.shift(row, shifts) for row in x[:, :length]]
        np.testing.assert_array_equal(shift_tokens(x[:, :length], shifts), expected)


@pytest.mark.parametrize("shifts", SHIFTS)
def test_no_group_crosses_the_start_of_a_sequence_or_reads_padding(shifts):
    x = draw(1, 9, 6)
    ids = jnp.array([[1, 1, 1, 2, 2, 3, 3, 3, 3]])
    packed = shift_tokens(x, shifts, starts=starts_of_runs(ids, None))
    alone = [definitions.shift(x[0, a:b], shifts) for a, b in ((0, 3), (3, 5), (5, 9))]
    np.testing.assert_array_equal(packed[0], np.concatenate(alone))
    mask = jnp.arange(9)[None] % 8 > 1  # Two of padding at the front, one at the back.
    visible = slice(2, 8)

    def padded(x):
        starts = starts_of_runs(None, mask)
        return shift_tokens(x, shifts, key_mask=mask, starts=starts)[0, visible]

    np.testing.assert_array_equal(padded(x), definitions.shift(x[0, visible], shifts))
    gradient = jax.grad(lambda x: jnp.sum(padded(x)))(x)
    np.testing.assert_array_equal(gradient[~mask], 0)


def test_decoding_follows_either_order_of_groups():
    x = draw(2, 5, 6)
    whole = shift_tokens(x, (1, 0))
    steps = [
        shift_tokens(x[:, t : t + 1], (1, 0), before=x[:, t - 1] if t else None) for t in range(5)
    ]
    np.testing.assert_array_equal(jnp.concatenate(steps, 1), whole)


def test_shifts_that_cannot_be_are_told():
    x = jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match=r"got \(0, 1, 2\) for 2 channels"):
        shift_tokens(x, (0, 1, 2))
    with pytest.raises(ValueError, match=r"only shifts of 0 and 1, got \(0, -1\)"):
        shift_tokens(x, (0, -1), before=x[:, 0])


def test_a_sequence_cut_in_two_is_shifted_as_a_whole():
    x = jax.random.normal(jax.random.key(0), (2, 9, 6))
    whole = shift_tokens(x)
    left, right = shift_tokens(x[:, :4]), shift_tokens(x[:, 4:], before=x[:, 3])
    np.testing.assert_array_equal(jnp.concatenate([left, right], 1), whole)


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
