import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.data.fasta import read_fasta
from fast_attention.protein_lm.modeling import token_batches
from fast_attention.protein_lm.modeling.token_batches import (
    compute_stream,
    plan_batches,
    windows,
)

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@hypothesis.given(LENGTHS, st.integers(1, 500), st.integers(1, 3))
def test_every_sequence_has_one_place_in_batches_of_the_budget(lengths, budget, devices):
    shapes: set[tuple[int, int]] = set()
    plan = plan_batches(lengths, budget, shapes, devices=devices)
    places = [place for batch in plan for place in batch.members]
    assert sorted(places) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch.members) <= batch.rows
        assert max(lengths[place] for place in batch.members) <= batch.width
        assert batch.rows == 1 or batch.rows * batch.width <= budget
    assert shapes == {batch[1:] for batch in plan}


@hypothesis.given(LENGTHS, st.integers(1, 500), st.integers(1, 5))
def test_windows_are_the_stream_and_no_larger_than_they_may(lengths, budget, batches):
    found = list(windows(lengths, int, budget, batches))
    assert list(itertools.chain.from_iterable(found)) == lengths
    assert all(len(window) == 1 or sum(window) <= budget * batches for window in found)


def test_a_stream_is_read_one_window_ahead():
    taken = itertools.count()
    stream = windows((next(taken) * 0 + 10 for _ in range(10**9)), int, 100, 2)
    assert len(next(stream)) == 20
    assert next(taken) == 21


def test_equal_histories_give_equal_plans():
    generator = np.random.default_rng(0)
    stream = [generator.integers(1, 900, 300).tolist() for _ in range(3)]
    plans = []
    for _ in range(2):
        shapes: set[tuple[int, int]] = set()
        plans.append([plan_batches(window, 4096, shapes) for window in stream])
    assert plans[0] == plans[1]


def test_programs_are_a_handful_and_padding_is_small():
    lengths = [len(record.sequence) + 1 for record in read_fasta(bundled_corpus("train"))]
    shapes: set[tuple[int, int]] = set()
    padded = 0
    for window in windows(lengths, int):
        plan = plan_batches(window, token_batches.TOKENS_PER_BATCH, shapes)
        padded += sum(batch.rows * batch.width for batch in plan)
    assert max(lengths) > 8000
    assert len(shapes) <= 10
    assert padded < 1.35 * sum(lengths)
    assert max(lengths) * len(lengths) > 12 * padded


def test_few_sequences_make_small_batches():
    shapes: set[tuple[int, int]] = set()
    (batch,) = plan_batches([100, 120, 90], 2**14, shapes)
    assert batch.rows * batch.width <= 4 * 128
    (alone,) = plan_batches([10**5], 2**14, shapes)
    assert alone.rows == 1 and alone.width < 1.25 * 10**5


def test_results_come_in_the_order_of_the_stream():
    generator = np.random.default_rng(1)
    items = [np.arange(n) for n in generator.integers(1, 70, 1500)]
    done = []
    found = compute_stream(
        items,
        len,
        lambda rows, shape: token_batches.fill(rows, shape),
        lambda batch, row, item: batch[row, : len(item)],
        256,
        set(),
        progress=lambda members: done.extend(map(len, members)),
    )
    for one, other in zip(found, items, strict=True):
        np.testing.assert_array_equal(one, other)
    assert sum(done) == sum(map(len, items))


def test_an_empty_stream_gives_nothing():
    assert list(windows([], len)) == []


def test_a_budget_must_be_positive():
    with pytest.raises(ValueError, match="tokens_per_batch must be at least 1, but got 0"):
        next(windows([1], int, 0))
