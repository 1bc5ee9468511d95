import jax
import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.runs.averaging import set_average


def make(seed, **options):
    domain = make_protein_domain(length=8, include_bos=False, include_mask=False)
    sizes = {"emb_dim": 8, "num_heads": 1, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8}
    return FlaxModel(domain, objective="span_corruption", random_seed=seed, **sizes, **options)


def test_an_average_is_that_of_numpy():
    models = [make(seed) for seed in range(3)]
    expected = jax.tree.map(
        lambda *arrays: np.mean(np.asarray(arrays, np.float64), axis=0),
        *(model.weights for model in models),
    )
    set_average(models[0], {"b": models[1], "c": models[2]})
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7),
        models[0].weights,
        expected,
    )


def test_an_id_that_means_another_token_is_told():
    """Arrays of equal shapes, whose last rows are those of a begin and of a mask token."""
    with pytest.raises(RunError, match=r"other: .* the ids of its special tokens differ"):
        set_average(make(0, with_bos=True), {"other": make(0, with_mask=True)})
