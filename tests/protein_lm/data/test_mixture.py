import itertools
from typing import Any

import numpy as np
import pytest

from fast_attention.protein_lm.data.corpus import load_corpus
from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord, write_fasta
from fast_attention.protein_lm.data.mixture import (
    MixturePlanner,
    load_mixture,
    row_shares,
)
from fast_attention.protein_lm.data.packing import EpochPlanner
from fast_attention.protein_lm.modeling.pipeline import make_dataset

DOMAIN = make_protein_domain()
OPTIONS: dict[str, Any] = {"length": 40, "batch_size": 8, "seed": 0}


@pytest.fixture
def sources(tmp_path):
    """Three files, of one residue each: A, C, D."""
    generator = np.random.default_rng(0)
    paths = []
    for letter, number in (("A", 30), ("C", 400), ("D", 5)):
        lengths = generator.integers(5, 80, number)
        records = [FastaRecord(f"p{i}", "", letter * size) for i, size in enumerate(lengths)]
        paths.append(str(tmp_path / f"{letter}.fasta"))
        write_fasta(paths[-1], records)
    return paths


def dataset(weights, **options):
    return make_dataset(weights, DOMAIN, **(OPTIONS | options))


def source_of_rows(weights, number, **options):
    """The residue of each row; every row has one."""
    rows = []
    for batch in itertools.islice(dataset(weights, **options), -(-number // 8)):
        for row in batch["targets"]:
            letters = set(DOMAIN.vocab.decode(row)) & set("ACD")
            assert len(letters) == 1
            rows += letters
    return "".join(rows)[:number]


def test_rows_are_in_proportion_to_the_weights_in_every_batch(sources):
    rows = source_of_rows(dict(zip(sources, (1, 2.5, 0.5), strict=True)), 2000)
    for period in (rows[:1000], rows[1000:]):
        assert [period.count(letter) for letter in "ACD"] == [250, 625, 125]
    for first in range(0, 2000, 8):
        assert [rows[first : first + 8].count(letter) for letter in "ACD"] == pytest.approx(
            [2, 5, 1], abs=1
        )


def test_shares_are_rounded_and_never_nothing():
    np.testing.assert_array_equal(row_shares([1, 1, 1]), [334, 333, 333])
    np.testing.assert_array_equal(row_shares([2]), [1000])
    np.testing.assert_array_equal(row_shares([999.4, 0.6]), [999, 1])
    for weights, message in (
        ([1, 0], "positive number; got 0"),
        ([1, -1.0], "positive number"),
        ([float("nan")], "positive number"),
        ([1, True], "positive number"),
        ([1, 1e-5], "less than one row"),
    ):
        with pytest.raises(ValueError, match=message):
            row_shares(weights)


def test_rows_do_not_depend_on_how_they_are_asked_for(sources):
    parts = load_mixture(dict.fromkeys(sources, 1.0), DOMAIN).parts

    def planner():
        options = {"seed": 3, "pack": True, "shuffle": True, "random_crop": True}
        planners = [EpochPlanner(part, 40, **options, stream=k) for k, part in enumerate(parts)]
        return MixturePlanner(planners, [3, 1, 1])

    together, alone = planner().pieces(990, 30), planner()
    rows = [alone.pieces(row, 1) for row in reversed(range(990, 1020))][::-1]
    for name in ("proteins", "starts", "lengths"):
        expected = np.concatenate([getattr(row, name) for row in rows])
        np.testing.assert_array_equal(getattr(together, name), expected)


def test_a_mixture_is_resumed(sources):
    weights = dict(zip(sources, (1, 2, 3), strict=True))
    iterator, fresh = iter(dataset(weights)), iter(dataset(weights))
    for _ in range(5):
        next(iterator)
    fresh.set_state(iterator.get_state())
    expected, found = next(iterator), next(fresh)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)


def test_every_protein_of_a_source_comes_before_any_comes_again(sources):
    """Source A has fewer rows than its share of an epoch, and begins anew."""
    mixture = load_mixture(dict.fromkeys(sources, 1.0), DOMAIN)
    corpus, parts = mixture.corpus, mixture.parts
    options = {"seed": 0, "pack": True, "shuffle": True, "random_crop": True}
    planners = [EpochPlanner(part, 40, **options, stream=k) for k, part in enumerate(parts)]
    mixed = MixturePlanner(planners, [1, 1, 1])
    assert mixed.num_rows == sum(planner.num_rows for planner in planners)
    proteins = mixed.pieces(0, 3 * planners[0].num_rows).proteins
    assert sorted(proteins[proteins < 30]) == list(range(30))
    assert proteins.max() < len(corpus) == 435


def test_epochs_of_a_mixture_have_as_many_rows_as_its_files(sources):
    weights = dict.fromkeys(sources, 1.0)
    single = len(list(dataset(sources, batch_size=1, num_epochs=1, pack=False)))
    mixed = len(list(dataset(weights, batch_size=1, num_epochs=1, pack=False)))
    assert single == mixed == 435


def test_one_source_is_the_source_itself(sources):
    mixed, plain = dataset({sources[0]: 0.3}), dataset(sources[0])
    for one, other in itertools.islice(zip(mixed, plain, strict=True), 5):
        np.testing.assert_array_equal(one["targets"], other["targets"])


def test_the_proteins_of_a_mixture_are_those_of_its_files(sources):
    mixture = load_mixture(dict.fromkeys(sources, 1.0), DOMAIN)
    whole, parts = mixture.corpus, mixture.parts
    expected = load_corpus(sources, DOMAIN)
    np.testing.assert_array_equal(whole.tokens, expected.tokens)
    np.testing.assert_array_equal(whole.offsets, expected.offsets)
    for part, source in zip(parts, sources, strict=True):
        alone = load_corpus(source, DOMAIN)
        assert len(part) == len(alone)
        np.testing.assert_array_equal(part.lengths, alone.lengths)
