from typing import Any

import numpy as np
import pytest

from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.data.fasta import read_fasta
from fast_attention.protein_lm.modeling.objectives import Masked
from fast_attention.protein_lm.modeling.pipeline import (
    bundled_corpus,
    eval_batches,
    load_corpus,
)

DOMAIN = make_protein_domain()
VOCAB = DOMAIN.vocab


@pytest.fixture(scope="module")
def tiny():
    return load_corpus(bundled_corpus("tiny"), DOMAIN)


def segments(batch, key="targets"):
    """The token strings of the proteins of a batch, one a row."""
    return [
        VOCAB.decode(row[ids == 1])
        for row, ids in zip(batch[key], batch["segment_ids"], strict=True)
        if ids.any()
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_evaluation_sees_every_protein_once_from_its_start(tiny, batch_size):
    sequences = [record.sequence for record in read_fasta(bundled_corpus("tiny"))]
    batches = list(eval_batches(tiny, DOMAIN, length=150, batch_size=batch_size))
    seen = [protein for batch in batches for protein in segments(batch)]
    assert sorted(seen) == sorted(f"{sequence}>"[:150] for sequence in sequences)
    assert {batch["inputs"].shape for batch in batches} <= {
        (batch_size, width) for width in (38, 75, 150)
    }
    assert all(batch["segment_ids"].max() == 1 for batch in batches)
    for batch in batches:
        np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)
        inputs, targets = segments(batch, "inputs"), segments(batch)
        assert inputs == ["<" + target[:-1] for target in targets]


def test_short_proteins_are_evaluated_in_short_rows(tiny):
    batches = list(eval_batches(tiny, DOMAIN, length=400, batch_size=50))
    assert {batch["inputs"].shape for batch in batches} == {(50, 100), (50, 200), (50, 400)}


def test_the_last_residue_of_a_cropped_protein_is_masked_like_any_other(tiny):
    """Without a share one residue of each protein is chosen; sequences begin behind a token."""
    objective = Masked(mask_rate=0.0, enclose=True)
    (batch,) = eval_batches(tiny, DOMAIN, length=20, batch_size=600, objective=objective)
    rows, columns = np.nonzero(batch["weights"])
    assert rows.tolist() == list(range(len(tiny)))
    assert set(columns) == set(range(1, 21))
    assert (columns == 20).mean() < 0.1


def test_the_end_need_not_be_scored(tiny):
    with_end, without = (
        list(eval_batches(tiny, DOMAIN, length=301, batch_size=50, score_eos=score_eos))
        for score_eos in (True, False)
    )
    assert sum(batch["weights"].sum() for batch in with_end) == len(tiny.tokens)
    assert sum(batch["weights"].sum() for batch in without) == len(tiny.tokens) - len(tiny)
    for batch in without:
        assert not batch["weights"][batch["targets"] == VOCAB.eos].any()


def masks(corpus, **options: Any):
    """What is given for each protein in evaluation."""
    found = {}
    for batch in eval_batches(corpus, DOMAIN, length=100, **({"objective": "masked"} | options)):
        found.update(zip(segments(batch), segments(batch, "inputs"), strict=True))
    return found


def test_evaluation_masks_depend_on_the_seed_and_not_on_the_batch(tiny):
    expected = masks(tiny, batch_size=8)
    assert masks(tiny, batch_size=3) == masks(tiny, batch_size=600) == expected
    assert masks(tiny, batch_size=8, seed=1) != expected
    rate = sum(given.count("*") for given in expected.values()) / sum(map(len, expected))
    assert 0.11 < rate < 0.13


def test_masking_shares_reach_the_masks(tiny):
    shares = Masked(mask_rate=1.0, mask_token_proportion=1.0, random_token_proportion=0.0)
    given = masks(tiny, batch_size=8, objective=shares)
    assert all(set(inputs) <= {"*", ">"} for inputs in given.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": "bert"},
            "objective must be one of causal, masked, span_corruption, but got 'bert'",
        ),
        ({"length": 0}, "length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_arguments_are_checked_at_once(tiny, options, message):
    arguments: dict[str, Any] = {"length": 64, "batch_size": 4, **options}
    with pytest.raises(ValueError, match=message):
        eval_batches(tiny, DOMAIN, **arguments)
