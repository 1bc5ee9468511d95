"""Training on inputs with targets, and on single batches; weights that are taken and put back."""

import jax
import numpy as np
import pytest

from fast_attention.protein_lm import FixedLengthDiscreteDomain, make_protein_domain
from fast_attention.protein_lm.data.vocabulary import Vocabulary
from fast_attention.protein_lm.modeling.metrics import combine_metrics
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {
    "num_layers": 1,
    "num_heads": 1,
    "qkv_dim": 8,
    "emb_dim": 8,
    "mlp_dim": 8,
    "batch_size": 4,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}
DOMAIN = FixedLengthDiscreteDomain(vocab=Vocabulary(4, include_bos=True), length=3)
ROWS = np.array([[1, 1, 0], [1, 2, 3], [3, 0, 0], [2, 2, 1], [0, 1, 2]])
SHIFTED = np.concatenate([np.full((5, 1), 4), ROWS[:, :-1]], axis=1)


@pytest.fixture
def lm():
    return FlaxLM(DOMAIN, **SIZES)


FORMS = {
    "pair": (SHIFTED, ROWS),
    "lists": (SHIFTED.tolist(), ROWS.tolist()),
    "weights": (SHIFTED, ROWS, np.ones(ROWS.shape)),
    "dict": {"inputs": SHIFTED, "targets": ROWS},
    "dict_weights": {"inputs": SHIFTED, "targets": ROWS, "weights": np.ones(ROWS.shape)},
}


@pytest.mark.parametrize("form", FORMS)
def test_shifted_rows_are_the_pairs_of_a_causal_model(lm, form):
    """Every form says the same as the rows alone, in evaluation, logits and training."""
    xs = FORMS[form]
    assert lm.evaluate(xs) == pytest.approx(lm.evaluate(ROWS), rel=1e-5)
    np.testing.assert_allclose(lm.logits(xs), lm.logits(ROWS), rtol=1e-5, atol=1e-5)
    one, other = lm.evaluate_batch(xs), lm.evaluate_batch(ROWS)
    for name in ("loss", "accuracy", "denominator"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5)
    again = FlaxLM(DOMAIN, **SIZES)
    np.testing.assert_allclose(lm.fit_batch(xs)["loss"], again.fit_batch(ROWS)["loss"], rtol=1e-5)
    np.testing.assert_allclose(lm.logits(ROWS), again.logits(ROWS), rtol=1e-3, atol=1e-4)


def test_fit_goes_through_all_pairs_in_every_epoch(lm):
    report = lm.fit((SHIFTED, ROWS), epochs=3)
    # 5 rows are two batches of 4, the second filled up with rows of weight 0.
    assert (report["steps"], report["average"]["denominator"]) == (6, 3 * ROWS.size)
    assert lm.fit({"inputs": SHIFTED, "targets": ROWS}, max_steps=1)["steps"] == 1


def test_several_batches_may_have_any_form(lm):
    given = [ROWS, (SHIFTED, ROWS), {"inputs": SHIFTED, "targets": ROWS}]
    assert lm.fit(given)["average"]["denominator"] == 3 * ROWS.size
    assert lm.fit(iter(given))["steps"] == 3
    assert lm.evaluate(given, steps=2)["denominator"] == 2 * ROWS.size


def test_targets_are_learnt_whatever_they_are(lm):
    """Pairs need not be a shift: here the target is the input plus one."""
    lm = FlaxLM(DOMAIN, **SIZES, learning_rate=0.05)
    for _ in range(60):
        lm.fit_batch((ROWS, (ROWS + 1) % 4))
    predicted = np.argmax(lm.logits((ROWS, ROWS)), axis=-1)
    np.testing.assert_array_equal(predicted, (ROWS + 1) % 4)


def test_weights_count_positions(lm):
    weights = np.zeros(ROWS.shape)
    weights[0, 1] = 2.0
    sums = lm.evaluate_batch((SHIFTED, ROWS, weights))
    assert sums["denominator"] == 2
    log_probability = jax.nn.log_softmax(lm.logits((SHIFTED, ROWS)))[0, 1, ROWS[0, 1]]
    np.testing.assert_allclose(sums["loss"], -2 * log_probability, rtol=1e-5)
    none = lm.evaluate_batch((SHIFTED, ROWS, np.zeros(ROWS.shape)))
    assert none["denominator"] == 0


def test_padding_of_pairs_is_neither_read_nor_predicted():
    domain = make_protein_domain(length=6)
    model = FlaxLM(domain, **SIZES)
    pad, eos, bos = domain.vocab.pad, domain.vocab.eos, domain.vocab.bos
    short = (np.array([[bos, 1, 2]]), np.array([[1, 2, eos]]))
    padded = (np.array([[bos, 1, 2, pad]]), np.array([[1, 2, eos, pad]]))
    assert model.evaluate(padded) == pytest.approx(model.evaluate(short), rel=1e-5)


@pytest.mark.parametrize(
    ("xs", "message"),
    [
        ((SHIFTED, ROWS[:3]), "got targets of shape"),
        ((SHIFTED, ROWS + 5), "targets must be ids from 0 to 4"),
        ((SHIFTED - 9, ROWS), "inputs must be ids from 0 to 4"),
        ((SHIFTED + 0.5, ROWS), "inputs must be ids from 0 to 4"),
        ((SHIFTED, ROWS, np.full(ROWS.shape, np.nan)), "weights must be finite"),
        ({"inputs": SHIFTED}, "'inputs', 'targets' and perhaps 'weights'"),
        ({"inputs": SHIFTED, "targets": ROWS, "labels": ROWS}, "got a dict with"),
        ({"inputs": SHIFTED, "targets": {"regression": ROWS}}, "fine-tune"),
    ],
    ids=["shape", "high", "low", "float", "weights", "missing", "unknown", "regression"],
)
def test_what_is_no_pair_is_told(lm, xs, message):
    for ask in (lm.fit, lm.evaluate, lm.fit_batch, lm.evaluate_batch):
        with pytest.raises(ValueError, match=message):
            ask(xs)


def test_weights_of_examples_are_not_for_pairs(lm):
    with pytest.raises(ValueError, match="example_weights are for sequences"):
        lm.fit((SHIFTED, ROWS), example_weights=[1.0] * 5)


@pytest.mark.parametrize("one", ["110", [1, 1, 0]], ids=["string", "ids"])
def test_one_sequence_is_no_batch(lm, one):
    with pytest.raises(ValueError, match=r"give \[sequence\]"):
        lm.fit_batch(one)
    with pytest.raises(ValueError, match=r"give \[sequence\]"):
        lm.fit(iter([one]))


def test_fit_batch_is_a_step_of_fit():
    one, other = FlaxLM(DOMAIN, **SIZES), FlaxLM(DOMAIN, **SIZES)
    sums = [one.fit_batch(ROWS) for _ in range(3)]
    report = other.fit([ROWS] * 3)
    assert combine_metrics(sums) == pytest.approx(report["average"])
    assert int(one.state.step) == int(other.state.step) == 3
    for metrics in sums:
        assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(
            ("loss", "accuracy", "denominator"), (1,)
        )


def test_a_masked_model_masks_rows_and_takes_pairs_as_they_are():
    domain = make_protein_domain(length=6)
    model = FlaxBERT(domain, **SIZES)
    sums = model.evaluate_batch(["MKTAYI", "ACDEFG"])
    assert 2 <= sums["denominator"] < 12
    assert model.fit_batch(["MKTAYI", "ACDEFG"])["denominator"] < 12
    rows = np.array(domain.encode(["MKTAYI", "ACDEFG"]))
    assert model.evaluate_batch((rows, rows))["denominator"] == 12


# --- get_weights and set_weights -----------------------------------------------------------------


def test_weights_are_put_back_with_the_optimiser_and_the_step(lm):
    """Training from weights taken earlier is the training that followed them."""
    lm.fit_batch(ROWS)
    taken = lm.get_weights()
    before = lm.logits(ROWS)
    first = [lm.fit_batch(ROWS)["loss"] for _ in range(2)]
    for _ in range(2):
        lm.set_weights(taken)
        assert int(lm.state.step) == 1
        np.testing.assert_array_equal(lm.logits(ROWS), before)
        np.testing.assert_array_equal([lm.fit_batch(ROWS)["loss"] for _ in range(2)], first)
    other = FlaxLM(DOMAIN, **SIZES, random_seed=5)
    other.set_weights(taken)
    np.testing.assert_array_equal(other.logits(ROWS), before)


def test_weights_of_another_model_are_refused(lm):
    wider = FlaxLM(DOMAIN, **(SIZES | {"mlp_dim": 16}))
    with pytest.raises(ValueError, match="weights of another model"):
        lm.set_weights(wider.get_weights())
    with pytest.raises(TypeError, match="set_parameters"):
        lm.set_weights(wider.weights)


# --- Keywords of the original --------------------------------------------------------------------


def test_sampling_kwargs_are_the_defaults_of_samples():
    model = FlaxLM(DOMAIN, **SIZES, sampling_kwargs={"temperature": 0.0, "max_length": 2})
    key = jax.random.key(3)
    greedy = model.sample(4, key)
    assert greedy.shape == (4, 2)
    np.testing.assert_array_equal(greedy, np.repeat(greedy[:1], 4, axis=0))
    assert len(set(map(tuple, model.sample(40, key, temperature=9.0).tolist()))) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": False}, "decoding states exist only while sample"),
        ({"store_metrics": True}, "return their metrics"),
        ({"sampling_kwargs": {"repetition_penalty_normalize": True}}, "penalized as they are"),
        ({"sampling_kwargs": {"temprature": 1}}, "sample has max_length, min_length, temperature"),
    ],
    ids=["cache", "metrics", "normalize", "typo"],
)
def test_a_keyword_that_means_nothing_here_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlaxLM(DOMAIN, **SIZES, **options)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("positional_encoding_module", "positions='learned'"),
        ("self_attention_module", "attention_fn"),
        ("output_head", "fine-tune"),
        ("pad_token", "domain's vocabulary"),
    ],
)
def test_keywords_of_the_old_transformer_say_what_took_their_place(keyword, message):
    with pytest.raises(TypeError, match=message):
        FlaxLM(DOMAIN, **SIZES, **{keyword: None})


@pytest.mark.devices
def test_without_pmap_one_device_is_used():
    model = FlaxLM(DOMAIN, **SIZES, pmap=False)
    assert model.mesh.size == 1
    expected = FlaxLM(DOMAIN, **SIZES).evaluate(ROWS)
    assert model.evaluate(ROWS) == pytest.approx(expected, rel=1e-5)
