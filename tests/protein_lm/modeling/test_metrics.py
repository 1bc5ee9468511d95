import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.protein_lm.modeling import metrics
from fast_attention.protein_lm.runs.metrics_log import open_metrics_log, read_metrics
from fast_attention.protein_lm.runs.run_folder import RunFolder


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (4, 7, 29)).astype(np.float32)
    targets = generator.integers(0, 29, (4, 7)).astype(np.int32)
    weights = generator.integers(0, 2, (4, 7)).astype(np.float32)
    return tuple(map(jnp.asarray, (logits, targets, weights)))


def test_sums_are_those_of_the_definition(batch):
    logits, targets, weights = batch
    exact = np.asarray(logits, np.float64)
    log_probabilities = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    rows, columns = np.indices(targets.shape)
    sums = metrics.token_sums(*batch)
    loss = -(log_probabilities[rows, columns, np.asarray(targets)] * np.asarray(weights)).sum()
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(sums["correct"]) == ((logits.argmax(-1) == targets) * weights).sum().item()
    assert float(sums["denominator"]) == weights.sum().item()


def test_positions_without_weight_do_not_count(batch):
    logits, targets, weights = batch
    changed = jnp.where(weights[..., None] > 0, logits, 1e4)
    found, expected = (metrics.token_sums(x, targets, weights) for x in (changed, logits))
    assert found == expected


def test_batches_combine_as_one(batch):
    logits, targets, weights = batch
    parts = [metrics.token_sums(*(x[i : i + 1] for x in batch)) for i in range(4)]
    whole = metrics.combine_metrics([metrics.token_sums(logits, targets, weights)])
    combined = metrics.combine_metrics(jax.device_get(parts))
    assert combined == pytest.approx(whole, rel=1e-6)
    assert combined["perplexity"] == pytest.approx(math.exp(combined["loss"]))


@pytest.mark.parametrize("sums", [[], [{"loss": 0.0, "correct": 0.0, "denominator": 0.0}]])
def test_no_token_has_no_mean(sums):
    with pytest.raises(ValueError, match="no token"):
        metrics.combine_metrics(sums)


def test_perplexity_may_be_infinite():
    assert metrics.perplexity(1e6) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_told(value):
    metrics.check_finite([{"loss": 1.0}])
    with pytest.raises(FloatingPointError, match="gradient norm is .*learning rate"):
        metrics.check_finite([{"loss": 1.0}, {"loss": 1.0, "gradient_norm": value}])


def test_a_resumed_log_has_every_step_once(tmp_path):
    folder = RunFolder(tmp_path)
    with open_metrics_log(folder, 0) as log:
        for step in (1, 2, 3, 4):
            log.write(step, "train", {"loss": 1.0 / step})
    text = folder.metrics.read_text()
    folder.metrics.write_text(text + '{"step": 5, "split": "tr')
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3, 4]
    with open_metrics_log(folder, 2) as log:
        assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2]
        log.write(3, "train", {"loss": 7.0})
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert any(folder.tensorboard.iterdir())


def test_a_missing_log_is_empty(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
