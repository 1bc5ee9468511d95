import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.run_folder import RunError
from fast_attention.protein_lm.sampling import sample_proteins


@pytest.fixture(scope="module")
def model(lm_run):
    return load_run(lm_run).model


def test_samples_are_proteins(model):
    records = sample_proteins(model, 70)
    assert [record.id for record in records] == [f"sample_{i}" for i in range(1, 71)]
    for record in records:
        assert 0 < len(record.sequence) <= 64
        assert set(record.sequence) <= set("ACDEFGHIKLMNPQRSTVWYBOUXZ")
        ended = "ended by itself" in record.description
        assert ended or len(record.sequence) == 64
    assert len({record.sequence for record in records}) > 60


def test_equal_seeds_give_equal_proteins(model):
    one, same, other = (sample_proteins(model, 3, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


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
        ({"num_samples": 1, "prompt": "MKT", "max_length": 3}, "prompt"),
    ],
)
def test_bad_arguments_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        sample_proteins(model, **options)


def test_a_masked_model_is_refused(bert_run):
    with pytest.raises(RunError, match="FlaxLM"):
        sample_proteins(load_run(bert_run).model, 1)


def test_a_model_that_only_ends_is_told():
    model = FlaxLM(
        make_protein_domain(length=8), emb_dim=8, num_heads=1, num_layers=1, qkv_dim=8, mlp_dim=8
    )
    only_end = np.full((4, 8), model.domain.vocab.pad)
    only_end[:, 0] = model.domain.vocab.eos
    model.sample_with_prompt = lambda *arguments, **options: only_end
    with pytest.raises(RunError, match="train it longer"):
        sample_proteins(model, 4)
