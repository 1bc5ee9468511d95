import jax
import numpy as np
import pytest
from flax import nnx

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.sampling import sample_proteins
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM


def facts(record):
    return dict(pair.split("=") for pair in record.description.split())


@pytest.fixture(scope="module")
def model(lm_run):
    return load_run(lm_run).model


def test_samples_are_proteins(model):
    records = sample_proteins(model, 70)
    assert [record.id for record in records] == [f"sample_{i}" for i in range(1, 71)]
    for record in records:
        assert 0 < len(record.sequence) <= 64
        assert set(record.sequence) <= set("ACDEFGHIKLMNPQRSTVWYBOUXZ")
        assert facts(record)["residues"] == str(len(record.sequence))
        assert facts(record)["ended"] == ("no" if len(record.sequence) == 64 else "yes")
    assert len({record.sequence for record in records}) > 60


def test_equal_seeds_give_equal_proteins(model):
    one, same, other = (sample_proteins(model, 3, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_a_protein_depends_on_its_number_and_not_on_how_many_are_drawn(model):
    few, many = sample_proteins(model, 2, max_length=9), sample_proteins(model, 5, max_length=9)
    assert few == many[:2]
    assert len(set(record.sequence for record in many)) == 5


def test_the_log_likelihood_is_that_of_the_model_as_it_is(model):
    options = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.5, "repetition_window": 4}
    records = sample_proteins(model, 2, prompt="MKV", max_length=12, **options)
    for record in records:
        assert facts(record)["prompt"] == "MKV"
        logits = np.asarray(model.logits([record.sequence])[0], np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = model.domain.vocab.encode(record.sequence)
        total = sum(log_probabilities[place, token] for place, token in enumerate(ids))
        assert float(facts(record)["log_likelihood"]) == pytest.approx(total, abs=1e-3)


def test_no_protein_is_shorter_than_asked_for(model):
    records = sample_proteins(model, 8, min_length=40, temperature=3.0)
    assert all(len(record.sequence) >= 40 for record in records)
    assert min(len(record.sequence) for record in sample_proteins(model, 8, temperature=3.0)) < 40


def test_a_residue_costs_the_same_wherever_it_stands(model):
    transformer = nnx.merge(model.graphdef, model.state.parameters, model.state.variables)

    def cost(room):
        state = jax.eval_shape(lambda: transformer.init_state(2, room))
        step = jax.jit(transformer.step).lower(state, jax.ShapeDtypeStruct((2,), np.int32))
        return sum(leaf.size for leaf in jax.tree.leaves(state)), step.as_text()

    assert cost(2) == cost(64)


def test_a_prompt_begins_every_protein(model):
    records = sample_proteins(model, 3, prompt="mktay", max_length=9)
    assert all(record.sequence.startswith("MKTAY") for record in records)
    assert all(len(record.sequence) <= 9 for record in records)


def test_temperature_zero_is_greedy(model):
    records = sample_proteins(model, 2, prompt="MKT", temperature=0.0, max_length=12)
    assert records[0].sequence == records[1].sequence
    (again,) = sample_proteins(model, 1, prompt="MKT", top_k=1, seed=9, max_length=12)
    assert again.sequence == records[0].sequence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "at least 1"),
        ({"num_samples": 1, "prompt": "MKJ"}, "'J'"),
        ({"num_samples": 1, "prompt": "M<K"}, "residues"),
        ({"num_samples": 1, "max_length": 65}, "64"),
        ({"num_samples": 1, "min_length": 0}, "at least 1"),
        ({"num_samples": 1, "max_length": 9, "min_length": 10}, "max_length=9"),
        ({"num_samples": 1, "prompt": "MKT", "max_length": 3}, "prompt"),
    ],
)
def test_bad_arguments_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        sample_proteins(model, **options)


def test_a_masked_model_is_refused(bert_run):
    with pytest.raises(RunError, match="FlaxLM"):
        sample_proteins(load_run(bert_run).model, 1)


def test_a_model_that_would_only_end_still_writes_a_residue():
    model = FlaxLM(
        make_protein_domain(length=8), emb_dim=8, num_heads=1, num_layers=1, qkv_dim=8, mlp_dim=8
    )
    bias = model.state.parameters["head"]["bias"]
    model.state.parameters["head"]["bias"] = bias.at[model.domain.vocab.eos].set(100.0)
    records = sample_proteins(model, 2)
    assert [len(record.sequence) for record in records] == [1, 1]
