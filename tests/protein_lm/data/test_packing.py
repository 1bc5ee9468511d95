import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_attention.protein_lm.data.corpus import Corpus
from fast_attention.protein_lm.data.packing import (
    EpochPlanner,
    Pieces,
    fill_rows,
    pack_lengths,
)
from fast_attention.protein_lm.data.vocabulary import Vocabulary


def corpus_of(lengths):
    """A corpus in which no two tokens of two hundred and fifty in a row are the same."""
    offsets = np.cumsum([0, *lengths])
    return Corpus((np.arange(offsets[-1]) % 251).astype(np.uint8), offsets, Vocabulary(251))


def planner_of(lengths, length, **options):
    options = {"seed": 0, "pack": True, "shuffle": True, "random_crop": True, **options}
    return EpochPlanner(corpus_of(lengths), length, **options)


def epoch_of(planner, epoch):
    return planner.pieces(epoch * planner.num_rows, planner.num_rows)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS)
def test_no_row_overflows_and_rows_are_few(lengths):
    lengths = np.array(lengths)
    rows = pack_lengths(lengths, 40)
    load = np.bincount(rows, lengths)
    assert load.max() <= 40
    assert load.min() > 0
    # Were two rows at most half full, the second would have gone into the first.
    assert np.sum(2 * load <= 40) <= 1


def test_packing_fills_rows():
    lengths = np.minimum(np.random.default_rng(0).gamma(1.5, 300, 3000).astype(int) + 20, 512)
    load = np.bincount(pack_lengths(lengths, 512), lengths)
    assert load.mean() / 512 > 0.98


def test_packing_is_the_tightest_fit():
    np.testing.assert_array_equal(pack_lengths(np.array([6, 5, 4, 3, 2]), 10), [0, 1, 0, 1, 1])


@given(LENGTHS, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3))
def test_an_epoch_has_every_protein_once_in_rows_that_fit(
    lengths, pack, shuffle, random_crop, epoch
):
    planner = planner_of(lengths, 25, pack=pack, shuffle=shuffle, random_crop=random_crop)
    pieces = epoch_of(planner, epoch)
    assert sorted(pieces.proteins) == list(range(len(lengths)))
    lengths = np.array(lengths)[pieces.proteins]
    np.testing.assert_array_equal(pieces.lengths, np.minimum(lengths, 25))
    assert (pieces.starts >= 0).all()
    assert (pieces.starts + pieces.lengths <= lengths).all()
    assert (np.diff(pieces.rows) >= 0).all()
    assert np.bincount(pieces.rows, pieces.lengths).max() <= 25
    assert len(np.unique(pieces.rows)) == planner.num_rows
    if not pack:
        assert planner.num_rows == len(lengths)
    if not random_crop:
        assert not pieces.starts.any()


@given(LENGTHS, st.integers(0, 50), st.integers(1, 9))
def test_rows_do_not_depend_on_how_they_are_asked_for(lengths, first, number):
    together = planner_of(lengths, 25).pieces(first, number)
    alone = [planner_of(lengths, 25).pieces(first + row, 1) for row in reversed(range(number))]
    for name in ("proteins", "starts", "lengths"):
        np.testing.assert_array_equal(
            getattr(together, name), np.concatenate([getattr(one, name) for one in alone[::-1]])
        )


def test_epochs_and_seeds_differ_in_order_neighbours_and_crops():
    lengths = np.random.default_rng(0).integers(5, 60, 300)
    epochs = [
        epoch_of(planner_of(lengths, 50), 0),
        epoch_of(planner_of(lengths, 50), 1),
        epoch_of(planner_of(lengths, 50, seed=1), 0),
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        one, other = epochs[one], epochs[other]
        assert not np.array_equal(one.proteins, other.proteins)
        starts = [pieces.starts[np.argsort(pieces.proteins)] for pieces in (one, other)]
        assert not np.array_equal(starts[0], starts[1])
        pairs = [
            {
                frozenset(pieces.proteins[i : i + 2].tolist())
                for i in np.flatnonzero(np.diff(pieces.rows) == 0)
            }
            for pieces in (one, other)
        ]
        assert len(pairs[0] & pairs[1]) < 0.6 * len(pairs[0])


def test_full_rows_do_not_always_come_first():
    planner = planner_of([40] + [25] * 9, 40, random_crop=False)
    rows = {
        int(pieces.rows[pieces.lengths == 40][0])
        for pieces in (epoch_of(planner, epoch) for epoch in range(200))
    }
    assert rows == set(range(planner.num_rows))


def test_without_shuffling_epochs_are_alike():
    planner = planner_of([3, 9, 4, 4, 8], 8, shuffle=False, random_crop=False)
    first, second = (epoch_of(planner, epoch) for epoch in (0, 1))
    np.testing.assert_array_equal(first.proteins, second.proteins)
    unpacked = planner_of([3, 9, 4, 4, 8], 8, shuffle=False, pack=False)
    np.testing.assert_array_equal(epoch_of(unpacked, 5).proteins, np.arange(5))


def test_crops_reach_every_place_alike():
    planner = planner_of([12], 8)
    starts = [epoch_of(planner, epoch).starts[0] for epoch in range(1000)]
    counts = np.bincount(starts, minlength=5)
    assert len(counts) == 5
    # Binomial with mean 200 and standard deviation 12.6.
    assert np.abs(counts - 200).max() < 5 * 12.7


def test_rows_hold_their_pieces_with_segments_and_positions():
    corpus = Corpus(
        np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], np.uint8), np.array([0, 4, 6, 9]), Vocabulary(10)
    )
    pieces = Pieces(
        proteins=np.array([1, 0, 2]),
        starts=np.array([0, 1, 0]),
        lengths=np.array([2, 3, 3]),
        rows=np.array([0, 0, 2]),
    )
    rows = fill_rows(corpus, pieces, (4, 6), pad=99)
    pads = [99] * 6
    np.testing.assert_array_equal(
        rows.tokens, [[5, 6, 2, 3, 4, 99], pads, [7, 8, 9, 99, 99, 99], pads]
    )
    np.testing.assert_array_equal(
        rows.segment_ids, [[1, 1, 2, 2, 2, 0], [0] * 6, [1, 1, 1, 0, 0, 0], [0] * 6]
    )
    np.testing.assert_array_equal(
        rows.positions, [[0, 1, 0, 1, 2, 0], [0] * 6, [0, 1, 2, 0, 0, 0], [0] * 6]
    )
    assert rows.tokens.dtype == rows.segment_ids.dtype == rows.positions.dtype == np.int32


@pytest.mark.parametrize("pack", [True, False])
def test_a_single_protein_makes_a_row(pack):
    pieces = planner_of([3], 8, pack=pack).pieces(0, 4)
    np.testing.assert_array_equal(pieces.rows, np.arange(4))
