import numpy as np
import pytest

from fast_attention.protein_lm.data.vocabulary import ProteinVocab, Vocabulary
from fast_attention.protein_lm.modeling.objectives.masked import Masked, mask_tokens

VOCAB = ProteinVocab(
    include_anomalous_amino_acids=True,
    include_bos=True,
    include_eos=True,
    include_pad=True,
    include_mask=True,
)


def rows(num_rows=200, protein_length=100):
    """Rows of two proteins with their ends, and padding."""
    generator = np.random.default_rng(0)
    tokens = generator.choice(VOCAB.ordinary_ids, (num_rows, 2 * protein_length + 5))
    segment_ids = np.zeros_like(tokens)
    segment_ids[:, :protein_length] = 1
    segment_ids[:, protein_length:-5] = 2
    tokens[:, [protein_length - 1, -6]] = VOCAB.eos
    tokens[:, 0] = VOCAB.bos
    tokens[:, -5:] = VOCAB.pad
    return tokens, segment_ids


def mask(tokens, segment_ids, seed=0, config=None):
    draws = np.random.default_rng(seed).random((2, *tokens.shape))
    return mask_tokens(tokens, segment_ids, VOCAB, draws, config or Masked())


def test_shares_are_those_of_the_configuration():
    tokens, segment_ids = rows()
    inputs, chosen = mask(tokens, segment_ids)
    residues = np.isin(tokens, VOCAB.ordinary_ids)
    # 5 standard errors of a binomial.
    bound = 5 * np.sqrt(0.15 * 0.85 / residues.sum())
    assert abs(chosen[residues].mean() - 0.15) < bound
    number = chosen.sum()
    hidden = (inputs == VOCAB.mask)[chosen].mean()
    changed = (inputs != tokens)[chosen].mean() - hidden
    assert abs(hidden - 0.8) < 5 * np.sqrt(0.8 * 0.2 / number)
    # A random residue is the same one for a 20th of the standard ones.
    standard = np.isin(tokens[chosen], VOCAB.standard_ids).mean()
    assert abs(changed - 0.1 * (1 - standard / 20)) < 5 * np.sqrt(0.1 * 0.9 / number)


def test_what_is_not_chosen_is_not_touched_and_specials_never_are():
    tokens, segment_ids = rows()
    for config in (Masked(), Masked(mask_rate=1.0)):
        inputs, chosen = mask(tokens, segment_ids, config=config)
        np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
        assert not np.isin(tokens[chosen], VOCAB.special_ids).any()
    assert chosen.sum() == np.isin(tokens, VOCAB.ordinary_ids).sum()
    assert inputs.dtype == np.int32


def test_random_residues_are_standard_and_uniform():
    tokens, segment_ids = rows()
    config = Masked(1.0, mask_token_proportion=0.0, random_token_proportion=1.0)
    inputs, chosen = mask(tokens, segment_ids, config=config)
    counts = np.bincount(inputs[chosen], minlength=20)
    assert len(counts) == 20
    mean = chosen.sum() / 20
    assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)


@pytest.mark.parametrize(
    ("proportions", "expected"),
    [((1.0, 0.0), lambda tokens: VOCAB.mask), ((0.0, 0.0), lambda tokens: tokens)],
)
def test_extreme_proportions(proportions, expected):
    tokens, segment_ids = rows(10)
    inputs, chosen = mask(tokens, segment_ids, config=Masked(0.5, *proportions))
    np.testing.assert_array_equal(inputs, np.where(chosen, expected(tokens), tokens))


def test_every_protein_has_a_chosen_residue():
    tokens, segment_ids = rows(300, 6)
    _, chosen = mask(tokens, segment_ids, config=Masked(mask_rate=0.0))
    for segment in (1, 2):
        np.testing.assert_array_equal((chosen & (segment_ids == segment)).sum(1), 1)
    # The one is any of the residues.
    assert chosen[:, 1:5].any(0).all()
    assert chosen[:, 6:-6].any(0).all()


def test_proteins_of_special_tokens_alone_are_left_alone():
    tokens = np.array([[VOCAB.eos, VOCAB.pad], [0, VOCAB.eos]])
    inputs, chosen = mask(tokens, np.array([[1, 0], [1, 1]]), config=Masked(1.0, 1.0, 0.0))
    np.testing.assert_array_equal(inputs, [[VOCAB.eos, VOCAB.pad], [VOCAB.mask, VOCAB.eos]])
    np.testing.assert_array_equal(chosen, [[False, False], [True, False]])


def test_rows_do_not_look_at_each_other():
    tokens, segment_ids = rows(20)
    draws = np.random.default_rng(3).random((2, *tokens.shape))
    together = mask_tokens(tokens, segment_ids, VOCAB, draws, Masked())
    for row in range(20):
        part = slice(row, row + 1)
        alone = mask_tokens(tokens[part], segment_ids[part], VOCAB, draws[:, part], Masked())
        for one, all_rows in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, all_rows[part])


def test_equal_draws_give_equal_masks_and_inputs_are_not_changed():
    tokens, segment_ids = rows(10)
    before = tokens.copy()
    one, same, other = (mask(tokens, segment_ids, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one[1], other[1])
    np.testing.assert_array_equal(tokens, before)


def test_a_vocabulary_without_mask_token_is_refused():
    tokens = np.zeros((1, 3), int)
    with pytest.raises(ValueError, match="include_mask=True"):
        mask_tokens(tokens, tokens + 1, Vocabulary("ab"), np.zeros((2, 1, 3)), Masked())


@pytest.mark.parametrize(
    ("shares", "name"),
    [
        ((1.5,), "mask_rate"),
        ((-0.1,), "mask_rate"),
        ((0.15, -0.5, 0.1), "mask_token_proportion"),
        ((0.15, 0.5, -0.1), "random_token_proportion"),
        ((0.15, 0.8, 0.3), r"mask_token_proportion \+ random_token_proportion"),
    ],
)
def test_shares_must_be_shares(shares, name):
    with pytest.raises(ValueError, match=name):
        Masked(*shares)


def test_shares_may_sum_to_one():
    Masked(1.0, 0.7, 0.3)
    Masked(0.15, 0.1, 0.9)
