from pathlib import Path

import gin
import jax
import pytest

from fast_attention.protein_lm import gin_registry
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

FOLDER = Path(__file__).parents[3] / "protein_lm_configs"
PAPER = ["lm_softmax", "lm_generalized", "bert_softmax", "bert_generalized"]
SMALL = [f"{name}_small" for name in PAPER]


def load(name: str, *bindings: str):
    gin_registry.configure([FOLDER / f"{name}.gin"], bindings)
    return gin.get_bindings("experiment")["model_cls"]()


def test_every_file_is_known():
    shared = {"base", "small"}
    assert {path.stem for path in FOLDER.glob("*.gin")} == {
        *PAPER,
        *SMALL,
        *shared,
        "demo",
        "longer",
        "pretrained",
    }


@pytest.mark.parametrize("name", [*PAPER, *SMALL, "demo", "longer", "pretrained"])
def test_the_model_can_be_built(name):
    model = load(name, "FlaxModel.num_layers = 1")
    assert type(model) is (FlaxBERT if name.startswith("bert") else FlaxLM)
    experiment = gin.get_bindings("experiment")
    tokens = jax.ShapeDtypeStruct((1, experiment["max_train_length"]), jax.numpy.int32)
    batch = {"inputs": tokens, "positions": tokens, "segment_ids": tokens}
    state = jax.eval_shape(model.initialize, jax.random.key(0))
    logits = jax.eval_shape(
        lambda *arguments: model.logits_step(*arguments, packed=True),
        state.parameters,
        state.variables,
        batch,
    )
    assert logits.shape == (*tokens.shape, 29)
    projections = {leaf.shape for leaf in jax.tree.leaves(state.variables)}
    features = {"demo": 64, "longer": 64, "pretrained": 64}.get(name, 128 if name in SMALL else 256)
    assert projections == {(features, model.config.head_dim)}


@pytest.mark.parametrize("name", PAPER)
def test_full_size_is_that_of_the_paper(name):
    gin_registry.configure([FOLDER / f"{name}.gin"])
    assert gin.query_parameter("FlaxModel.num_layers") == 36
    model = load(name, "FlaxModel.num_layers = 1")
    config = model.config
    assert (config.emb_dim, config.num_heads, config.head_dim) == (512, 8, 64)
    assert (config.mlp_dim, config.max_len, model.domain.length) == (1024, 1024, 1024)
    assert (config.dropout_rate, config.attention_dropout_rate) == (0.1, 0.1)
    bindings = gin.get_bindings("FlaxModel")
    assert bindings["learning_rate"] == 1e-3
    assert (bindings["grad_clip"], bindings["weight_decay"]) == (0.5, 0.1)
    assert (bindings["beta1"], bindings["beta2"], bindings["epsilon"]) == (0.9, 0.98, 1e-9)
