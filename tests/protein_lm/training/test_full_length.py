"""A model for proteins of n residues takes proteins of n residues, whatever is asked of it."""

import math

import numpy as np
import pytest

from fast_attention.protein_lm import FixedLengthDiscreteDomain, domain_to_bos, make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.data.vocabulary import Vocabulary
from fast_attention.protein_lm.inference.infilling import infill_proteins
from fast_attention.protein_lm.inference.mutation_effects import score_variants
from fast_attention.protein_lm.inference.mutations import (
    all_substitutions,
    parse_variant,
)
from fast_attention.protein_lm.inference.sampling import sample_proteins
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {"num_layers": 1, "num_heads": 1, "qkv_dim": 8, "emb_dim": 8, "mlp_dim": 8}
FULL = "ACDEFHIKLNQP"


@pytest.fixture(scope="module", params=[{}, {"max_len": 12}], ids=["domain", "max_len"])
def lm(request):
    length = 30 if request.param else 12
    return FlaxLM(make_protein_domain(length=length), **SIZES, **request.param)


@pytest.fixture(scope="module")
def bert():
    return FlaxBERT(make_protein_domain(length=12), **SIZES)


def test_a_causal_model_takes_them(lm):
    assert lm.max_length == 12
    assert lm.fit([FULL])["steps"] == 1
    assert np.isfinite(lm.evaluate([FULL])["loss"])
    assert np.isfinite(lm.logits([FULL])).all()
    for pool in ("mean", "eos", None):
        assert np.isfinite(lm.embed([FULL], pool=pool)[0]).all()
    (score,) = lm.score([FULL])
    assert np.isfinite(score.log_likelihood_with_end)
    assert len(lm.sample(1, min_length=12)[0]) == 12
    assert len(sample_proteins(lm, 1, prompt=FULL[:11], min_length=12)[0].sequence) == 12
    scores = score_variants(lm, FULL, all_substitutions(FULL, [0, 11]))
    assert all(np.isfinite(column).all() for column in scores.values())


def test_the_end_after_a_full_protein_is_one_outcome_of_the_vocabulary(lm):
    """What comes after the last residue is scored as after any other."""
    (item,) = lm.score([FULL])
    row = np.array([[lm.bos_token, *lm.domain.vocab.encode(FULL)]])
    batch = {
        "inputs": row,
        "targets": np.append(row[:, 1:], [[lm.eos_token]], axis=1),
        "weights": np.ones(row.shape, np.float32),
        "segment_ids": np.ones(row.shape, np.int32),
        "positions": np.arange(13)[None],
    }
    total = -lm.evaluate(batch)["loss"] * 13
    assert item.log_likelihood_with_end == pytest.approx(total, rel=1e-4)


def test_a_masked_model_takes_them(bert):
    assert bert.fit([FULL])["steps"] == 1
    assert np.isfinite(bert.evaluate([FULL])["loss"])
    for pool in ("mean", "eos", None):
        assert np.isfinite(bert.embed([FULL], pool=pool)[0]).all()
    (score,) = bert.score([FULL])
    assert np.isfinite(score.pseudo_log_likelihood)
    scores = score_variants(bert, FULL, [parse_variant("A1C", FULL)])
    assert all(np.isfinite(column).all() for column in scores.values())
    hidden = FastaRecord("a", "", "*" + FULL[1:-1] + "*")
    (filled,) = infill_proteins(bert, [hidden])
    assert (filled.sequence[1:-1], len(filled.sequence)) == (FULL[1:-1], 12)


def test_one_residue_more_is_refused(lm, bert):
    longer = FULL + "A"
    for model in (lm, bert):
        for ask in (model.embed, model.score):
            with pytest.raises(ValueError, match="has 13 residues.*room for 12"):
                ask([longer])
    with pytest.raises(ValueError, match="13 residues are more than the 12"):
        score_variants(lm, FULL, [parse_variant("A1_C2insW", FULL)])


# --- A domain without special tokens -----------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    """The domain of the original's own tests: four tokens, none of them special."""
    return FlaxLM(FixedLengthDiscreteDomain(vocab_size=4, length=3), **SIZES)


def test_a_begin_token_is_added_where_the_domain_has_none(plain):
    assert plain.bos_token == domain_to_bos(plain.domain) == 4
    assert (plain.vocab_size, plain.domain.vocab_size) == (5, 4)
    assert (plain.eos_token, plain.pad_token, plain.mask_token) == (None, None, None)
    assert plain.logits([[1, 1, 0]]).shape == (1, 3, 5)


def test_a_model_without_special_tokens_does_all_that_others_do(plain):
    rows = [[1, 1, 0], [3, 2, 1]]
    assert plain.fit(rows)["steps"] == 1
    assert plain.evaluate(rows)["denominator"] == 6
    samples = plain.sample(50, temperature=3.0)
    assert samples.shape == (50, 3)
    assert set(samples.reshape(-1).tolist()) == {0, 1, 2, 3}
    (score,) = plain.score(["110"])
    assert np.isfinite(score.log_likelihood) and math.isnan(score.log_likelihood_with_end)
    assert np.isfinite(plain.embed(["110"])).all()


def test_an_added_mask_token_comes_after_the_begin_token():
    domain = FixedLengthDiscreteDomain(vocab=Vocabulary(4, include_eos=True), length=3)
    model = FlaxLM(domain, with_mask=True, **SIZES)
    assert (model.bos_token, model.mask_token, model.vocab_size) == (5, 6, 7)
    assert set(model.sample(40, temperature=9.0).reshape(-1).tolist()) <= {0, 1, 2, 3, 4}


def test_a_causal_model_without_begin_token_is_refused():
    with pytest.raises(ValueError, match="with_bos=False"):
        FlaxLM(FixedLengthDiscreteDomain(vocab_size=4, length=3), with_bos=False, **SIZES)


# --- Many tokens --------------------------------------------------------------------------------


def test_ids_above_255_are_tokens_of_their_own():
    vocab = Vocabulary(300, include_bos=True, include_eos=True, include_pad=True)
    model = FlaxLM(FixedLengthDiscreteDomain(vocab=vocab, length=3), **SIZES)
    one, other = (model.logits(np.array([row])) for row in ([299, 257, 1], [43, 1, 1]))
    assert (one[:, 1:] != other[:, 1:]).any()
    log_probabilities = np.log(np.exp(one - one.max(-1, keepdims=True)))
    log_probabilities -= np.log(np.exp(log_probabilities).sum(-1, keepdims=True))
    expected = -log_probabilities[0, np.arange(3), [299, 257, 1]].mean()
    assert model.evaluate([[299, 257, 1]])["loss"] == pytest.approx(float(expected), rel=1e-4)
    prompt = np.array([[model.bos_token, 299]])
    assert model.sample_with_prompt(prompt)[0, 0] == 299
    for wrong in (300, 2**32 + 1):
        with pytest.raises(ValueError, match="residues after the begin token"):
            model.sample_with_prompt(np.array([[model.bos_token, wrong]]))


def test_a_masked_model_refuses_what_is_no_id(bert):
    for wrong in (29, -1, 2**32 + 1):
        with pytest.raises(ValueError, match="expected ids"):
            bert.sample(np.array([[1, wrong, 2]]))
