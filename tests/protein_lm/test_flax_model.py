import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM, FlaxModel

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


def make(model_class: Any = FlaxLM, **options: Any) -> Any:
    return model_class(DOMAIN, **(SIZES | {"batch_size": 4} | options))


@pytest.fixture
def untrained():
    return make()


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


@pytest.mark.devices
def test_training_resumes_from_its_state():
    """Two fits are one; a step depends on nothing but the state and the batch."""
    batches = [packed_batch(second) for second in ("ACDEF", "WWHHG", "LLLLL", "ACDEF")]
    options = {"dropout_rate": 0.2, "attention_dropout_rate": 0.1}
    once, twice = make(**options), make(**options)
    once.fit(batches)
    twice.fit(iter(batches[:2]))
    twice.fit(batches[2:])
    jax.tree.map(np.testing.assert_array_equal, once.state.parameters, twice.state.parameters)
    assert int(once.state.step) == 4


def test_weights_of_a_batch_are_its_weights(untrained):
    batch = packed_batch("ACDEF")
    whole = untrained.evaluate(batch)
    half = untrained.evaluate(batch | {"weights": batch["weights"] * (batch["segment_ids"] == 1)})
    assert (whole["denominator"], half["denominator"]) == (batch["weights"].sum(), 6)
    assert half["loss"] != pytest.approx(whole["loss"])


def test_fit_accepts_every_form_of_sequences(untrained):
    model = untrained
    strings, ids = TOY, DOMAIN.encode(TOY)
    assert model.fit(strings)["steps"] == 1
    assert model.fit(ids, epochs=3)["steps"] == 3
    assert model.fit(jnp.asarray(ids), epochs=3, max_steps=2)["steps"] == 2
    assert model.fit([list(row) for row in ids])["steps"] == 1
    batches = [packed_batch("ACDEF")]
    assert model.fit(itertools.repeat(batches[0]), max_steps=3)["steps"] == 3
    report = model.fit(batches, epochs=2)
    assert report["steps"] == 2
    assert report["average"]["denominator"] == 2 * report["last"]["denominator"]


@pytest.mark.parametrize(
    ("xs", "options", "message"),
    [
        ([], {}, "no sequence"),
        (["MKT" * 9], {}, "27 residues"),
        ([[0, 1, VOCAB.eos, 2]], {}, "sequence 0"),
        ([[VOCAB.bos, 1]], {}, "sequence 0"),
        ([[VOCAB.eos]], {}, "sequence 0"),
        (TOY, {"max_steps": 0}, "no step"),
        (iter([packed_batch("ACDEF")]), {"epochs": 2}, "iterator"),
    ],
)
def test_fit_says_what_is_wrong(untrained, xs, options, message):
    with pytest.raises(ValueError, match=message):
        untrained.fit(xs, **options)


def test_one_string_is_not_taken_for_several_proteins(untrained):
    for use in (untrained.fit, untrained.evaluate):
        with pytest.raises(TypeError, match="one string: give"):
            use("MKT")


def test_divergence_stops_fit(untrained):
    batch = packed_batch("ACDEF")
    batch["weights"] = batch["weights"] * np.nan
    with pytest.raises(FloatingPointError, match="diverged"):
        untrained.fit([batch])


def test_an_update_that_is_not_finite_is_left_out():
    model = make(ema_decay=0.9)
    batch = packed_batch("ACDEF")
    model.fit([batch])
    before = jax.device_get(dataclasses.replace(model.state, key=None))
    bad = batch | {"weights": batch["weights"] * np.inf}
    state, sums = model.train_step(model.state, bad)
    assert not np.isfinite(sums["gradient_norm"])
    after = jax.device_get(dataclasses.replace(state, key=None))
    assert (int(before.step), int(after.step)) == (1, 2)
    for part in ("parameters", "variables", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    model.state = state
    assert model.fit([batch])["steps"] == 1


def test_predictions_are_those_of_the_averaged_parameters():
    batches = [packed_batch(second) for second in ("ACDEF", "WWHHG", "LLLLL", "ACDEF", "MMMMM")]
    model, plain = make(ema_decay=0.25), make()
    expected = jax.device_get(model.state.parameters)
    for step, batch in enumerate(batches):
        model.fit([batch])
        plain.fit([batch])
        decay = min(0.25, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * np.asarray(new),
            expected,
            model.state.parameters,
        )
    for one, other in ((model.state.parameters, plain.state.parameters), (model.weights, expected)):
        jax.tree.map(
            lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6),
            one,
            other,
        )
    assert plain.weights is plain.state.parameters
    averaged = make()
    averaged.set_parameters(model.weights, model.state.variables)
    assert averaged.evaluate(TOY) == model.evaluate(TOY) != plain.evaluate(TOY)
    np.testing.assert_array_equal(averaged.score(TOY), model.score(TOY))
    np.testing.assert_array_equal(averaged.sample(2), model.sample(2))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="ema_decay"):
        make(ema_decay=decay)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layer": 3}, "num_layers"),
        ({"vocab_size": 30}, "vocab_size"),
        ({"causal": False}, "causal"),
    ],
)
def test_an_unknown_parameter_is_refused(options, message):
    with pytest.raises(TypeError, match=message):
        make(**options)


def test_the_base_class_is_no_model():
    with pytest.raises(TypeError, match="FlaxLM"):
        FlaxModel(DOMAIN)


def test_a_missing_mask_token_is_told():
    with pytest.raises(ValueError, match="include_mask"):
        FlaxBERT(make_protein_domain(length=12, include_mask=False), **SIZES)


def test_bad_mask_shares_are_refused():
    with pytest.raises(ValueError, match="proportion"):
        make(FlaxBERT, mask_token_proportion=0.8, random_token_proportion=0.3)


def test_random_seed_decides_the_parameters():
    one, same, other = (make(random_seed=seed).state for seed in (0, 0, 1))
    one, same, other = (state.parameters["head"]["kernel"] for state in (one, same, other))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
