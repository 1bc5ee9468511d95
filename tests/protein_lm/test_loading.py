"""Runs that are read back from their folder."""

import copy

import gin
import jax
import numpy as np
import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM


def test_a_run_is_read_back_without_gin(lm_run):
    before = gin.config_str()
    model, step, folder = load_run(lm_run)
    assert isinstance(model, FlaxLM)
    assert (step, folder.path) == (12, lm_run)
    assert model.domain.length == 64
    again = load_run(lm_run).model
    assert gin.config_str() == before
    proteins = ["MKTAYIAK"]
    np.testing.assert_array_equal(model.logits(proteins), again.logits(proteins))


def test_the_optimizer_takes_no_memory_until_a_model_is_trained(lm_run):
    others = jax.live_arrays()
    before = {array.unsafe_buffer_pointer() for array in others}
    model = load_run(lm_run).model
    model.score(["MKTAYIAKQR"])
    now = {array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays()}
    needed = sum(array.nbytes for array in jax.tree.leaves((model.weights, model.variables)))
    assert sum(now[place] for place in now.keys() - before) < 1.2 * needed
    weights = jax.device_get(model.weights)
    for _ in range(2):  # The first step has a rate of 0.
        model.fit(["MKTAYIAKQR"])
    assert model.step == 2
    after = jax.device_get(model.weights)
    assert not all(map(np.array_equal, jax.tree.leaves(weights), jax.tree.leaves(after)))


def test_training_takes_no_array_of_another_model(lm_run):
    proteins = ["MKTAYIAKQR"]
    model = load_run(lm_run).model
    first = copy.copy(model)
    expected = first.logits(proteins)
    model.fit(proteins)
    np.testing.assert_array_equal(first.logits(proteins), expected)
    second, third = copy.copy(model), copy.copy(model)
    arrays = jax.tree.map(np.array, (first.weights, first.variables))
    second.set_parameters(model.weights, model.variables)
    third.set_parameters(*arrays)
    jax.tree.map(lambda array: array.fill(0), arrays)
    trained = second.logits(proteins)
    model.fit(proteins)
    np.testing.assert_array_equal(second.logits(proteins), trained)
    np.testing.assert_array_equal(third.logits(proteins), expected)


def test_a_changed_vocabulary_is_told(lm_run, tmp_path):
    text = (lm_run / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"A"', '"C"'))
    with pytest.raises(RunError, match="occur more than once"):
        load_run(tmp_path)


def test_a_run_is_found_by_any_path(lm_run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(lm_run)
    monkeypatch.chdir(lm_run.parent)
    for path in (tmp_path / "link", f"{lm_run.name}/../{lm_run.name}", lm_run.name):
        assert load_run(path).step == 12
