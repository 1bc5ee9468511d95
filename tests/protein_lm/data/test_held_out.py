import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.data import held_out
from fast_attention.protein_lm.data.corpus import Corpus
from fast_attention.protein_lm.data.held_out import choose_held_out, sequence_hashes
from fast_attention.protein_lm.modeling.batches import as_corpus

DOMAIN = make_protein_domain(length=40)
LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def proteins(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(LETTERS, rng.integers(5, 30))) for _ in range(number)]


def corpus(sequences: list[str]) -> Corpus:
    return as_corpus(sequences, DOMAIN)


def test_a_hash_is_a_function_of_the_letters_alone():
    sequences = proteins(20)
    expected = sequence_hashes(corpus(sequences))
    assert len(set(expected.tolist())) == 20
    np.testing.assert_array_equal(sequence_hashes(corpus(sequences[::-1])), expected[::-1])
    other = make_protein_domain(length=40, include_anomalous_amino_acids=False, include_mask=True)
    assert other.vocab.eos != DOMAIN.vocab.eos
    np.testing.assert_array_equal(sequence_hashes(as_corpus(sequences, other)), expected)


def test_a_share_is_held_out_with_all_copies():
    sequences = proteins(2000)
    chosen = choose_held_out(sequence_hashes(corpus(sequences + sequences)), 0.05)
    assert 60 <= chosen[:2000].sum() <= 140
    np.testing.assert_array_equal(chosen[:2000], chosen[2000:])


def test_a_protein_stays_on_its_side_when_others_are_added():
    hashes = sequence_hashes(corpus(proteins(300) + proteins(300, seed=1)))
    np.testing.assert_array_equal(
        choose_held_out(hashes[:300], 0.1), choose_held_out(hashes, 0.1)[:300]
    )


def test_no_more_than_the_most_are_held_out(monkeypatch):
    monkeypatch.setattr(held_out, "MOST", 7)
    assert choose_held_out(sequence_hashes(corpus(proteins(300))), 0.5).sum() == 7


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_sides_have_a_sequence_where_there_are_two(fraction):
    chosen = choose_held_out(sequence_hashes(corpus(proteins(5))), fraction)
    assert chosen.any() and not chosen.all()
    assert not choose_held_out(sequence_hashes(corpus(["MKT"] * 3)), fraction).any()
