"""What a model says of a protein is a sum that can be computed one residue at a time."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import FixedLengthDiscreteDomain, make_protein_domain
from fast_attention.protein_lm.data.vocabulary import ProteinVocab
from fast_attention.protein_lm.inference.scoring import (
    residue_log_likelihoods,
    score_sequences,
)
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {
    "emb_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "qkv_dim": 16,
    "mlp_dim": 16,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}
DOMAIN = make_protein_domain(length=24)
VOCAB = DOMAIN.vocab
RANDOM = np.random.default_rng(0)
PROTEINS = ["".join(RANDOM.choice(list("ACDEFGHIKLMNPQRSTVWYX"), n)) for n in (7, 1, 20, 3, 13, 8)]
TOLERANCE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}


def make(model_class: Any = FlaxLM, **options: Any) -> Any:
    attention_fn = make_fast_softmax_attention(nb_features=8)
    options = {"attention_fn": attention_fn, "positions": "rotary"} | SIZES | options
    model = model_class(DOMAIN, **options)
    # Fresh parameters know next to nothing: larger ones tell residues apart.
    state = model.state
    parameters = jax.tree.map(lambda x: 1.7 * x, state.parameters)
    model.state = dataclasses.replace(state, parameters=parameters)
    return model


@pytest.fixture(scope="module")
def lm():
    return make(shift_tokens=True)


@pytest.fixture(scope="module")
def bert():
    return make(FlaxBERT)


@pytest.mark.devices
def test_the_score_is_minus_the_loss(lm):
    scores = lm.score(PROTEINS)
    loss = lm.evaluate(PROTEINS)
    total = sum(score.log_likelihood_with_end for score in scores)
    assert -total == pytest.approx(loss["loss"] * loss["denominator"], rel=1e-5)
    assert sum(score.num_residues + 1 for score in scores) == loss["denominator"]


def test_the_score_is_what_decoding_step_by_step_gives(lm):
    module = nnx.merge(lm.graphdef, lm.state.parameters, lm.state.variables)
    step = jax.jit(module.step)
    for protein, score in zip(PROTEINS, lm.score(PROTEINS), strict=True):
        state, found = module.init_state(1, 32), []
        token = jnp.array([VOCAB.bos])
        for wanted in [*VOCAB.encode(protein), VOCAB.eos]:
            logits, state = step(state, token)
            found.append(float(jax.nn.log_softmax(logits[0])[wanted]))
            token = jnp.array([wanted])
        total = sum(found[:-1])
        assert score.num_residues == len(protein)
        assert score.log_likelihood == pytest.approx(total, **TOLERANCE)
        assert score.log_likelihood_with_end == pytest.approx(total + found[-1], **TOLERANCE)
        assert score.mean_log_likelihood == pytest.approx(total / len(protein), **TOLERANCE)
        assert score.perplexity == pytest.approx(math.exp(-total / len(protein)), rel=1e-4)


def test_the_pseudo_score_is_the_naive_loop(bert):
    module = nnx.merge(bert.graphdef, bert.state.parameters, bert.state.variables)
    for place in (0, 3):
        protein, score = PROTEINS[place], bert.score(PROTEINS)[place]
        rows = np.array([[*VOCAB.encode(protein), VOCAB.eos]] * len(protein))
        places = np.arange(len(protein))
        wanted = rows[places, places].copy()
        rows[places, places] = VOCAB.mask
        logits = np.asarray(jax.nn.log_softmax(jax.jit(module.__call__)(jnp.asarray(rows))))
        total = float(logits[places, places, wanted].sum())
        assert score.num_residues == len(protein)
        assert score.pseudo_log_likelihood == pytest.approx(total, **TOLERANCE)
        assert score.mean_pseudo_log_likelihood == pytest.approx(total / len(protein), **TOLERANCE)
        assert score.pseudo_perplexity == pytest.approx(math.exp(-total / len(protein)), rel=1e-4)


@pytest.mark.parametrize("name", ["lm", "bert"])
def test_neither_batches_nor_neighbours_nor_order_matter(name, request):
    model = request.getfixturevalue(name)
    together = model.score(PROTEINS)
    alone = [model.score([protein])[0] for protein in PROTEINS[:3]]
    backwards = list(score_sequences(model, iter(PROTEINS[::-1]), tokens_per_batch=40))[::-1]
    for one, other in [*zip(together, alone, strict=False), *zip(together, backwards, strict=True)]:
        assert one == pytest.approx(other, **TOLERANCE)


@pytest.mark.parametrize("name", ["lm", "bert"])
def test_residues_sum_to_the_score(name, request):
    model = request.getfixturevalue(name)
    done = []
    found = list(residue_log_likelihoods(model, PROTEINS, progress=done.append))
    assert sum(done) == sum(map(len, PROTEINS))
    for protein, (values, end), score in zip(PROTEINS, found, model.score(PROTEINS), strict=True):
        assert values.dtype == np.float32 and values.shape == (len(protein),)
        assert score[1] == pytest.approx(values.sum(dtype=np.float64))
        assert math.isnan(end) == (name == "bert")


def test_a_crop_is_scored_as_the_beginning_it_is(lm, bert):
    long = PROTEINS[2]
    (cropped,) = lm.score([long], max_length=5)
    (values, _), *_ = residue_log_likelihoods(lm, [long])
    assert cropped.num_residues == 5
    assert cropped.log_likelihood == pytest.approx(values[:5].sum(), **TOLERANCE)
    assert math.isnan(cropped.log_likelihood_with_end)
    whole, cropped = bert.score([long[:5]])[0], bert.score([long], max_length=5)[0]
    assert cropped.num_residues == 5
    assert whole != pytest.approx(cropped)  # The crop does not end in an end token.


def test_longer_than_the_domain_is_no_matter_without_learned_positions(lm):
    (score,) = lm.score(["MKV" * 1000])
    assert score.num_residues == 3000 and np.isfinite(score.log_likelihood_with_end)


def test_learned_positions_are_a_limit_that_is_told():
    model = make(positions="learned", max_len=10)
    exact, short = model.score(["ACDEFGHIKL", "ACDEFGHIK"])
    assert np.isfinite(exact.log_likelihood_with_end)
    loss = model.evaluate(["ACDEFGHIK"])
    assert -short.log_likelihood_with_end == pytest.approx(10 * loss["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="sequence 1 has 11 residues.*room for 10.*max_length=10"):
        model.score(["AC", "ACDEFGHIKLM"])
    assert model.score(["ACDEFGHIKLM"], max_length=10)[0].num_residues == 10


def test_a_vocabulary_without_end_has_no_end_to_score():
    vocab = ProteinVocab(include_bos=True)
    model = FlaxLM(FixedLengthDiscreteDomain(vocab=vocab, length=6), **SIZES)
    (score,) = model.score(["ACDEFG"])
    loss = model.evaluate(["ACDEFG"])
    assert -score.log_likelihood == pytest.approx(6 * loss["loss"], rel=1e-5)
    assert math.isnan(score.log_likelihood_with_end)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        (["MK", ""], {}, "sequence 1 is empty"),
        (["MK", "MJ"], {}, "sequence 1 has 'J'.*'X'"),
        (["mk"], {}, "upper case"),
        (["MK>"], {}, "'>'"),
        (["MK"], {"max_length": 0}, "max_length must be a whole number from 1"),
        (["MK"], {"tokens_per_batch": 0}, "tokens_per_batch must be at least 1"),
    ],
)
def test_bad_sequences_are_told(lm, sequences, options, message):
    with pytest.raises(ValueError, match=message):
        lm.score(sequences, **options)


def test_one_string_is_no_list_of_sequences(lm):
    with pytest.raises(TypeError, match="give \\[sequence\\]"):
        lm.score("MKT")
    with pytest.raises(TypeError, match="sequence 0 must be a string"):
        lm.score([[1, 2]])


def test_no_sequence_has_no_score(lm):
    assert lm.score([]) == []
