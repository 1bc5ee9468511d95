from typing import Any

import jax
import numpy as np
import pytest

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.modeling import pipeline
from fast_attention.protein_lm.modeling.batches import as_corpus
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {
    "emb_dim": 32,
    "num_heads": 2,
    "num_layers": 1,
    "qkv_dim": 32,
    "mlp_dim": 64,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}
DOMAIN = make_protein_domain(length=12)
VOCAB = DOMAIN.vocab
TOY = ["MKTAYIAK", "ACDEF", "WWWWHHHHGG"]
ATTENTION = {
    "exact": lambda: None,
    "softmax": lambda: make_fast_softmax_attention(nb_features=16),
    "generalized": lambda: make_fast_generalized_attention(nb_features=16),
}
WITH_SOFTMAX = pytest.mark.parametrize("trained", ["softmax"], indirect=True)


def make(model_class: Any = FlaxLM, **options: Any) -> Any:
    return model_class(DOMAIN, **(SIZES | {"batch_size": 4} | options))


@pytest.fixture(scope="module", params=ATTENTION)
def trained(request):
    """A causal model that knows TOY by heart."""
    model = make(attention_fn=ATTENTION[request.param](), learning_rate=3e-3, grad_clip=1.0)
    model.fit(TOY, epochs=300)
    return model


@pytest.fixture(scope="module")
def trained_bert():
    model = make(FlaxBERT, attention_fn=ATTENTION["softmax"](), learning_rate=3e-3, mask_rate=0.3)
    model.fit(TOY, epochs=400)
    return model


# --- FlaxLM -----------------------------------------------------------------------------------


def test_a_toy_set_is_learnt_by_heart(trained):
    # The first residue cannot be known: 1.1 nats shared by some nine tokens.
    assert trained.evaluate(TOY)["loss"] < 0.2


@WITH_SOFTMAX
def test_samples_are_the_toy_set_and_end_in_padding_only(trained):
    samples = trained.sample(32, jax.random.key(1))
    assert samples.shape == (32, DOMAIN.length)
    assert samples.dtype == np.int32
    with pytest.raises(ValueError, match="num_samples must be a whole number from 1"):
        trained.sample(0)
    assert not np.isin(samples, np.array([VOCAB.bos, VOCAB.mask])).any()
    ended = np.cumsum(samples == VOCAB.eos, axis=1) > 0
    assert (ended.any(axis=1)).mean() > 0.9
    after = np.roll(ended, 1, axis=1)
    after[:, 0] = False
    np.testing.assert_array_equal(samples == VOCAB.pad, after)
    found = [VOCAB.decode(row, stop_at_eos=True) for row in samples]
    assert np.mean([sequence in TOY for sequence in found]) > 0.7
    assert set(TOY) <= set(found)


def test_a_prompt_is_continued(trained):
    prompt = np.array([[VOCAB.bos, *VOCAB.encode("WW")]] * 2)
    samples = trained.sample_with_prompt(prompt, temperature=0.0)
    assert VOCAB.decode(samples[0], stop_at_eos=True) == TOY[2]
    np.testing.assert_array_equal(samples[0], samples[1])


@WITH_SOFTMAX
def test_samples_depend_on_the_key_alone(trained):
    first, again, other = (trained.sample(32, jax.random.key(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@WITH_SOFTMAX
def test_the_loss_is_minus_the_log_probability(trained):
    corpus = as_corpus(TOY, DOMAIN)
    log_probabilities = jax.nn.log_softmax(trained.logits(TOY))
    total = sum(
        float(log_probabilities[row, place, token])
        for row, sequence in enumerate(TOY)
        for place, token in enumerate([*VOCAB.encode(sequence), VOCAB.eos])
    )
    found = trained.evaluate(TOY)
    assert found["denominator"] == len(corpus.tokens) == sum(map(len, TOY)) + len(TOY)
    assert -total / found["denominator"] == pytest.approx(found["loss"], rel=1e-4)


@WITH_SOFTMAX
def test_evaluation_does_not_depend_on_the_batch_size(trained):
    expected = trained.evaluate(TOY)
    assert trained.evaluate(TOY, batch_size=2) == pytest.approx(expected, rel=1e-4)


def test_the_future_never_shows(trained):
    """The bound attention functions are bidirectional; FlaxLM makes them causal."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 20, (2, DOMAIN.length))
    changed = rows.copy()
    changed[:, 6:] = (rows[:, 6:] + 1 + generator.integers(0, 19, (2, 6))) % 20
    before, after = trained.logits(rows), trained.logits(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


def packed_batch(second: str):
    first, rest = VOCAB.encode("MKTAY"), VOCAB.encode(second)
    row = [*first, VOCAB.eos, *rest, VOCAB.eos, VOCAB.pad]
    inputs = [VOCAB.bos, *first, VOCAB.bos, *rest, VOCAB.pad]
    lengths = (len(first) + 1, len(rest) + 1, 1)
    return {
        "inputs": np.array([inputs], np.int32),
        "targets": np.array([row], np.int32),
        "weights": np.ones((1, len(row)), np.float32),
        "segment_ids": np.repeat([1, 2, 0], lengths)[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
    }


@WITH_SOFTMAX
def test_proteins_of_a_row_do_not_see_each_other(trained):
    one, two = trained.logits(packed_batch("ACDEF")), trained.logits(packed_batch("WWHHG"))
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert (one[:, 6:] != two[:, 6:]).any()
    alone = trained.logits(["MKTAY"])[:, :6]
    np.testing.assert_allclose(one[:, :6], alone, atol=1e-4)


@WITH_SOFTMAX
def test_rows_do_not_see_each_other(trained):
    together = trained.logits(["MKTAYIAK", "ACDEFGHI"])
    other = trained.logits(["MKTAYIAK", "WWWWWWWW"])
    np.testing.assert_array_equal(together[0], other[0])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[0, 1]], {}, "begin token"),
        ([[]], {}, "begin token"),
        ([[VOCAB.bos, VOCAB.pad]], {}, "residues"),
        ([[VOCAB.bos, 1, 2, 3]], {"max_length": 3}, "max_length"),
        ([[VOCAB.bos]], {"max_length": 13}, "max_length"),
    ],
)
def test_a_bad_prompt_is_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        make().sample_with_prompt(prompt, **options)


# --- FlaxBERT ---------------------------------------------------------------------------------


def test_bert_fills_in_what_it_has_learnt(trained_bert):
    ids = DOMAIN.encode(TOY)
    masked = ids.copy()
    masked[[0, 1, 2], [2, 1, 5]] = VOCAB.mask
    np.testing.assert_array_equal(trained_bert.sample(masked, temperature=0.0), ids)


def test_bert_changes_masked_positions_only_and_draws_residues(trained_bert):
    masked = np.full((16, 12), VOCAB.mask)
    masked[:, 3] = VOCAB.encode("W")
    masked[:, 9:] = [VOCAB.eos, VOCAB.pad, VOCAB.pad]
    filled = trained_bert.sample(masked, jax.random.key(0), temperature=5.0)
    np.testing.assert_array_equal(filled[masked != VOCAB.mask], masked[masked != VOCAB.mask])
    assert np.isin(filled[masked == VOCAB.mask], VOCAB.ordinary_ids).all()
    assert (filled[0] != filled[1]).any()


def test_bert_sees_both_sides_and_no_padding(trained_bert):
    ids = DOMAIN.encode(["MKTAYIAK"])
    changed = ids.copy()
    changed[0, 6] = VOCAB.encode("W")[0]
    one, two = trained_bert.logits(ids), trained_bert.logits(changed)
    assert (one[0, 0] != two[0, 0]).any()
    longer = trained_bert.logits([*TOY[:1], "ACDEFGHIKLMN"])
    np.testing.assert_allclose(longer[0, :9], one[0], atol=1e-4)


def test_bert_evaluation_depends_on_the_seed_and_not_on_the_batches(trained_bert):
    first = trained_bert.evaluate(TOY, seed=1)
    assert trained_bert.evaluate(TOY, seed=1, batch_size=1) == pytest.approx(first, rel=1e-4)
    others = [trained_bert.evaluate(TOY, seed=seed)["denominator"] for seed in range(2, 9)]
    assert len({first["denominator"], *others}) > 1


def test_bert_is_asked_for_residues_only():
    model = make(FlaxBERT, mask_rate=1.0, mask_token_proportion=1.0, random_token_proportion=0.0)
    dataset = pipeline.make_dataset(
        as_corpus(TOY, DOMAIN),
        DOMAIN,
        length=24,
        batch_size=2,
        seed=0,
        objective=model.objective,
    )
    batch = next(iter(dataset))
    assert batch["weights"].sum() == np.isin(batch["targets"], VOCAB.ordinary_ids).sum() > 0
    assert (batch["inputs"][batch["weights"] > 0] == VOCAB.mask).all()
