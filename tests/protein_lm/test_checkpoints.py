import subprocess
import sys
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from fast_attention.protein_lm import checkpoints, make_protein_domain, train
from fast_attention.protein_lm.checkpoints import Progress
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.run_folder import RunError

SIZES = {"emb_dim": 8, "num_heads": 1, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8}


def make(**options):
    return FlaxLM(make_protein_domain(length=8), **(SIZES | options))


@pytest.fixture(scope="module")
def model():
    return make()


def at_step(model, step: int):
    return checkpoints.TrainState(
        **{name: getattr(model.state, name) for name in ("parameters", "variables", "opt_state")},
        step=jax.numpy.int32(step),
        key=jax.random.key(step),
    )


def test_a_checkpoint_holds_everything(model, tmp_path):
    state = at_step(model, 7)
    progress = Progress({"next_index": 7, "nested": {"list": [1, 2]}}, 8, 12345, 1.25)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        assert checkpoints.restore(manager, train.abstract_state(model)) is None
        checkpoints.save(manager, state, progress)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        found = checkpoints.restore(manager, train.abstract_state(model))
    assert found is not None
    assert found[1] == progress
    assert jax.tree.structure(found[0]) == jax.tree.structure(state)
    for restored, saved in zip(jax.tree.leaves(found[0]), jax.tree.leaves(state), strict=True):
        assert restored.dtype == saved.dtype
        if jax.numpy.issubdtype(saved.dtype, jax.dtypes.prng_key):
            restored, saved = jax.random.key_data(restored), jax.random.key_data(saved)
        np.testing.assert_array_equal(restored, saved)


def test_the_newest_are_kept_and_the_newest_of_them_is_read(model, tmp_path):
    with checkpoints.open_checkpoints(tmp_path, keep=2) as manager:
        for step in (1, 2, 5):
            checkpoints.save(manager, at_step(model, step), Progress(None, 8, step, 0.0))
        checkpoints.save(manager, at_step(model, 5), Progress(None, 8, 99, 0.0))
    with checkpoints.open_checkpoints(tmp_path, keep=2) as manager:
        assert sorted(manager.all_steps()) == [2, 5]
        found = checkpoints.restore(manager, train.abstract_state(model))
    assert found is not None and (int(found[0].step), found[1].tokens) == (5, 5)
    assert checkpoints.restore_model(tmp_path, train.abstract_state(model))[0] == 5


@pytest.mark.parametrize("options", [{"mlp_dim": 16}, {"num_layers": 2}, {"emb_dim": 16}])
def test_a_checkpoint_of_another_model_is_refused(model, tmp_path, options):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, at_step(model, 1), Progress(None, 8, 0, 0.0))
        abstract = train.abstract_state(make(**options))
        with pytest.raises(RunError, match="does not fit"):
            checkpoints.restore(manager, abstract)
    with pytest.raises(RunError, match="does not fit"):
        checkpoints.restore_model(tmp_path, abstract)


def test_a_checkpoint_that_was_not_written_to_its_end_does_not_count(tmp_path):
    """A process that saves without pause is killed in the middle of it, several times."""
    script = """
import sys, jax.numpy as jnp, pathlib
from fast_attention.protein_lm import checkpoints
arrays = {str(i): jnp.full((256, 256), 1.0) for i in range(60)}
with checkpoints.open_checkpoints(pathlib.Path(sys.argv[1]), keep=2) as manager:
    step = manager.latest_step() or 0
    print("started", flush=True)
    while True:
        step += 1
        state = checkpoints.TrainState(jnp.int32(step), arrays, {}, {}, jnp.zeros(2))
        checkpoints.save(manager, state, checkpoints.Progress(step, 8, step, 0.0))
        print("saved", step, flush=True)
"""

    def state(step):
        arrays = {str(i): jax.numpy.ones((256, 256)) for i in range(60)}
        return checkpoints.TrainState(jax.numpy.int32(step), arrays, {}, {}, jax.numpy.zeros(2))

    abstract = checkpoints.abstract_like(
        state(0), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    cut_short = 0
    for delay in (0.02, 0.05, 0.08):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        newest = int(lines[-1].split()[-1])
        cut_short += any("tmp" in path.name for path in tmp_path.iterdir())
        with checkpoints.open_checkpoints(tmp_path, keep=2) as manager:
            found = checkpoints.restore(manager, abstract)
            assert found is not None
            assert found[1].tokens == int(found[0].step) in (newest, newest + 1)
    assert cut_short
    with checkpoints.open_checkpoints(tmp_path, keep=2) as manager:
        checkpoints.save(manager, state(1000), Progress(None, 8, 0, 0.0))
    assert not any("tmp" in path.name for path in tmp_path.iterdir())


def test_a_folder_without_a_run_is_told(tmp_path, model):
    with pytest.raises(RunError, match="not the folder of a run"):
        load_run(tmp_path)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunError, match="not reached its first"):
            checkpoints.restore_model(folder, train.abstract_state(model))


def test_a_run_is_read_back(lm_run):
    model, step, folder = load_run(lm_run)
    assert isinstance(model, FlaxLM)
    assert (step, folder.path) == (12, lm_run)
    assert model.domain.length == 64
    again = load_run(lm_run).model
    assert not gin.config_str()
    proteins = ["MKTAYIAK"]
    np.testing.assert_array_equal(model.logits(proteins), again.logits(proteins))


def test_a_changed_vocabulary_is_told(lm_run, tmp_path):
    for name in ("config.gin", "vocabulary.json"):
        (tmp_path / name).write_text((lm_run / name).read_text())
    text = (tmp_path / "vocabulary.json").read_text()
    (tmp_path / "vocabulary.json").write_text(text.replace('"A"', '"c"'))
    with pytest.raises(RunError, match="vocabulary"):
        load_run(tmp_path)
