from typing import Any

import jax
import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SEQUENCES = ["MKTAYIAK", "ACDEF", "WWHHGG"]


def make(model_class: Any = FlaxLM, **options: Any):
    return model_class(
        make_protein_domain(length=12),
        emb_dim=16,
        num_heads=2,
        num_layers=1,
        qkv_dim=16,
        mlp_dim=16,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        batch_size=4,
        **({"learning_rate": 0.01} | options),
    )


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def begin(model):
    """The model as it began, for each test."""
    model.state = model.initialize(jax.random.key(0))
    return model


def loss(model, sequences):
    return model.evaluate(sequences)["loss"]


def arrays(model):
    return jax.tree.leaves(jax.device_get(model.state.parameters))


def trained(model, sequences, weights, **options):
    model.state = model.initialize(jax.random.key(0))
    model.fit(sequences, example_weights=weights, **options)
    return arrays(model)


def test_training_makes_its_proteins_likelier_and_a_negative_weight_less_likely(begin):
    first, *others = SEQUENCES
    before = [loss(begin, [first]), loss(begin, others)]
    begin.fit(SEQUENCES, epochs=5, example_weights=[-1, 1, 1])
    assert loss(begin, [first]) > before[0]
    assert loss(begin, others) < before[1]


def test_a_weight_of_two_is_a_protein_twice(model):
    twice = trained(model, [*SEQUENCES, SEQUENCES[0]], [1, 1, 1, 1], epochs=2)
    heavy = trained(model, SEQUENCES, [2, 1, 1], epochs=2)
    light = trained(model, SEQUENCES, [1, 1, 1], epochs=2)
    for one, other in zip(twice, heavy, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert any(abs(one - other).max() > 1e-4 for one, other in zip(heavy, light, strict=True))


def test_a_weight_of_zero_is_a_protein_left_out(model):
    without = trained(model, SEQUENCES[:2], [1, 1])
    zero = trained(model, SEQUENCES, [1, 1, 0])
    for one, other in zip(without, zero, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_only_the_ratio_of_weights_matters(model):
    small, large = (trained(model, SEQUENCES, np.full(3, w)) for w in (1.0, 100.0))
    for one, other in zip(small, large, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_rate_of_zero_changes_nothing():
    model = make(learning_rate=0.0)
    before = arrays(model)
    # There are fewer proteins than a batch has rows, and yet a step is taken.
    assert model.fit(SEQUENCES, example_weights=[1, 2, 3])["steps"] == 1
    for now, then in zip(arrays(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_masked_models_count_weights_too():
    model = make(FlaxBERT)
    model.fit(SEQUENCES, epochs=2, batch_size=2, example_weights=[1, 2, 0.5])
    assert int(model.state.step) == 4


def test_weights_that_do_not_fit_are_told(model):
    for weights in ([1, 2], [1, 2, np.nan]):
        with pytest.raises(ValueError, match="one finite weight for each of the 3"):
            model.fit(SEQUENCES, example_weights=weights)
    with pytest.raises(ValueError, match="pairs and batches have .weights."):
        model.fit({"inputs": np.zeros((1, 1))}, example_weights=[1])
