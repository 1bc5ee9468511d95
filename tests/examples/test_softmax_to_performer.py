"""The example at small size: a figure, tables, and nothing measured twice."""

import json

import gin
import pytest

from examples import softmax_to_performer
from fast_attention.protein_lm.data.corpus import bundled_corpus

CONFIG = """
experiment.batch_size_per_device = 2
experiment.max_train_length = 32
experiment.num_eval_steps = 1
experiment.max_eval_length = 32
make_protein_domain.length = 64
FlaxModel.emb_dim = 16
FlaxModel.num_heads = 2
FlaxModel.num_layers = 1
FlaxModel.qkv_dim = 16
FlaxModel.mlp_dim = 16
FlaxModel.batch_size = 4
FlaxModel.learning_rate = @create_learning_rate_scheduler()
create_learning_rate_scheduler.factors = 'constant * linear_warmup * cosine_decay'
create_learning_rate_scheduler.base_learning_rate = 0.01
"""


@pytest.fixture(autouse=True)
def _no_gin_configuration():
    yield
    gin.clear_config()


def test_a_trained_model_becomes_a_performer(tmp_path, capsys):
    (tmp_path / "tiny.gin").write_text(CONFIG)
    sizes = ["--steps=2", "--every=1", "--length=32", "--rows=2", "--valid_batches=1"]
    arguments = [
        f"--output={tmp_path}",
        f"--gin_file={tmp_path / 'tiny.gin'}",
        *(f"--{name}={bundled_corpus('tiny')}" for name in ("fasta", "valid_fasta")),
        "--exact_steps=2",
        "--variants=wderf_s 64",
        *sizes,
    ]
    softmax_to_performer.main(arguments)
    found = json.loads((tmp_path / "wderf_s-64.json").read_text())
    assert [step for step, _ in found["curve"]] == [0, 1, 2]
    assert found["curve"][0][1] == found["calibrated"] != found["switched"]
    errors = json.loads((tmp_path / "wderf_s-64-layers.json").read_text())
    assert set(errors) == {"switched", "calibrated"}
    assert len(errors["calibrated"]["output"]) == 1
    assert len(errors["calibrated"]["output"][0]) == 2
    tables = (tmp_path / "tables.md").read_text()
    assert "after 2 steps" in tables and "| wderf_s 64, calibrated | 0." in tables
    assert (tmp_path / "recovery.png").stat().st_size > 1000
    capsys.readouterr()
    softmax_to_performer.main(arguments)
    assert "step 1" not in capsys.readouterr().out
