import numpy as np
import pytest

from fast_attention.protein_lm.data import padding


def test_padding_follows_the_sequence():
    padded = padding.pad_sequences([[1, 2], [3], []], length=4, value=9)
    assert padded.dtype == np.int32
    np.testing.assert_array_equal(padded, [[1, 2, 9, 9], [3, 9, 9, 9], [9, 9, 9, 9]])


def test_padding_defaults_to_the_longest_length_and_a_fresh_id():
    padded = padding.pad_sequences([[1, 5], np.array([3])])
    np.testing.assert_array_equal(padded, [[1, 5], [3, 6]])


def test_long_sequences_are_refused_and_not_cut():
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        padding.pad_sequences([[1, 2, 3]], length=2)


def test_unpadding_inverts_padding():
    sequences = [[1, 2], [3], []]
    unpadded = padding.unpad_sequences(padding.pad_sequences(sequences, 5, 9), 9)
    assert [list(row) for row in unpadded] == sequences


def test_a_value_ends_a_sequence_when_nothing_follows_it():
    rows = [[1, 9, 9], [9, 1, 9], [1, 2, 3], [9, 9, 9]]
    expected = [True, False, True, True]
    assert list(padding.sequences_end_with_value(rows, 9)) == expected
    assert list(padding.sequences_end_with_value(np.transpose(rows), 9, axis=0)) == expected


def test_stripping_fills_from_the_first_occurrence_on():
    stripped = padding.strip_sequences_at_value([[0, 1, 2], [0, 2], [0, 1, 0, 1]], 1)
    assert [list(row) for row in stripped] == [[0, 1, 1], [0, 2], [0, 1, 1, 1]]
