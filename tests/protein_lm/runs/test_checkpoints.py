import dataclasses
import errno
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.runs import checkpoints
from fast_attention.protein_lm.runs.checkpoints import Progress
from fast_attention.protein_lm.runs.run_folder import RunFolder
from tests.protein_lm.runs.checkpoint_cases import at_step, files_of, make, read, resume


def test_a_checkpoint_holds_everything(model, tmp_path):
    state = at_step(model, 7)
    progress = Progress({"next_index": 7, "nested": {"list": [1, 2]}}, 8, 12345, 1.25)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        assert checkpoints.restore(manager, model.abstract_state) is None
        checkpoints.save(manager, state, progress)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        found = checkpoints.restore(manager, model.abstract_state)
    assert found is not None
    assert found[1] == progress
    assert jax.tree.structure(found[0]) == jax.tree.structure(state)
    for restored, saved in zip(jax.tree.leaves(found[0]), jax.tree.leaves(state), strict=True):
        assert restored.dtype == saved.dtype
        if jax.numpy.issubdtype(saved.dtype, jax.dtypes.prng_key):
            restored, saved = jax.random.key_data(restored), jax.random.key_data(saved)
        np.testing.assert_array_equal(restored, saved)


def test_the_newest_and_the_best_are_kept(model, tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for step, best in ((1, None), (2, 2), (5, 2), (7, 2), (9, 2)):
            progress = Progress(None, 8, step, 0.0, best_step=best)
            checkpoints.save(manager, at_step(model, step), progress, keep=2)
        checkpoints.save(manager, at_step(model, 9), Progress(None, 8, 99, 0.0), keep=2)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [2, 7, 9]
        found = checkpoints.restore(manager, model.abstract_state)
        assert found is not None and (int(found[0].step), found[1].tokens) == (9, 9)
        progress = Progress(None, 8, 11, 0.0, best_step=11)
        checkpoints.save(manager, at_step(model, 11), progress, keep=2)
        assert sorted(manager.all_steps()) == [9, 11]


def test_the_best_the_last_or_a_step_is_read(stored, model):
    assert read(stored, model) == 6
    assert read(stored, model, "best") == 6
    assert read(stored, model, "last") == 9
    assert read(stored, model, 3) == 3
    with pytest.raises(RunError, match="step 4 .* steps 3, 6, 9"):
        read(stored, model, 4)
    with pytest.raises(ValueError, match="'best', 'last' or the number"):
        read(stored, model, "first")
    shutil.rmtree(stored / "6")
    assert read(stored, model, "best") == 9


def test_folders_may_have_any_path(stored, model, tmp_path, monkeypatch):
    odd = tmp_path / "a b\n%20é#?*"
    shutil.copytree(stored, odd / "stored")
    (tmp_path / "link").symlink_to(odd.name)
    monkeypatch.chdir(odd)
    for path in (odd / "stored", Path("stored"), Path("..", "link", "..", odd.name, "stored")):
        assert read(path, model) == 6
    assert resume(Path("..", "link", "stored"), model) == 9


def test_only_folders_with_a_number_are_checkpoints(stored, model):
    (stored / "12").write_text("")
    for name in ("007", "15.tmp", "\N{ARABIC-INDIC DIGIT NINE}"):
        (stored / name).mkdir()
    folder = RunFolder(stored.parent)
    assert folder.steps_kept() == [3, 6, 9]
    assert folder.newest_step() == read(stored, model, "last") == 9


def test_a_disk_without_room_is_not_written_to(stored, model, monkeypatch):
    usage = shutil.disk_usage(stored)._replace(free=1_048_577)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        checkpoints.open_checkpoints(stored) as manager,
        pytest.raises(RunError, match=r"1,048,577 bytes are free, 1,06\d,\d{3} needed"),
    ):
        checkpoints.save(manager, at_step(model, 12), Progress(None, 8, 12, 0.0))


def test_a_disk_that_fills_up_leaves_earlier_checkpoints(stored, model, monkeypatch):
    before = {path: path.read_bytes() for path in files_of(stored)}

    def fill(manager, step, args):
        half = Path(manager.directory, f"{step}.orbax-checkpoint-tmp", "model")
        half.mkdir(parents=True)
        (half / "manifest").write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with checkpoints.open_checkpoints(stored) as manager:
        monkeypatch.setattr(type(manager), "save", fill)
        with pytest.raises(RunError, match=r"step 12 cannot be written to .* disk is full"):
            checkpoints.save(manager, at_step(model, 12), Progress(None, 8, 12, 0.0), keep=1)
    assert resume(stored, model) == 9
    assert {path: path.read_bytes() for path in files_of(stored)} == before


def test_parameters_that_are_not_finite_are_not_saved(model, tmp_path):
    state = at_step(model, 1)
    state = dataclasses.replace(
        state, parameters=jax.tree.map(lambda leaf: leaf + np.inf, state.parameters)
    )
    with (
        checkpoints.open_checkpoints(tmp_path) as manager,
        pytest.raises(FloatingPointError, match=r"diverged .* embed"),
    ):
        checkpoints.save(manager, state, Progress(None, 8, 0, 0.0))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_average_is_what_is_loaded(tmp_path):
    averaged = make(ema_decay=0.9)
    state = at_step(averaged, 1)
    average = jax.tree.map(lambda leaf: leaf + 1, averaged.state.parameters)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        kept = dataclasses.replace(state, average=average)
        checkpoints.save(manager, kept, Progress(None, 8, 0, 0.0))
        found = checkpoints.restore(manager, averaged.abstract_state)
        with pytest.raises(RunError, match=r"does not fit .* average"):
            checkpoints.restore(manager, make().abstract_state)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[0].average, average)
    jax.tree.map(np.testing.assert_array_equal, found[0].parameters, state.parameters)
    loaded = checkpoints.restore_model(tmp_path, averaged.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, loaded.parameters, average)


@pytest.mark.parametrize("options", [{"mlp_dim": 16}, {"num_layers": 2}, {"emb_dim": 16}])
def test_a_checkpoint_of_another_model_is_refused(model, tmp_path, options):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, at_step(model, 1), Progress(None, 8, 0, 0.0))
        abstract = make(**options).abstract_state
        with pytest.raises(RunError, match="does not fit"):
            checkpoints.restore(manager, abstract)
    with pytest.raises(RunError, match="does not fit"):
        checkpoints.restore_model(tmp_path, abstract)


def test_a_checkpoint_that_was_not_written_to_its_end_does_not_count(tmp_path):
    """A process that saves without pause is killed in the middle of it, several times."""
    script = """
import sys, jax.numpy as jnp, pathlib
from fast_attention.protein_lm.runs import checkpoints
arrays = {str(i): jnp.full((256, 256), 1.0) for i in range(60)}
with checkpoints.open_checkpoints(pathlib.Path(sys.argv[1])) as manager:
    step = manager.latest_step() or 0
    print("started", flush=True)
    while True:
        step += 1
        state = checkpoints.TrainState(jnp.int32(step), arrays, {}, {}, jnp.zeros(2))
        checkpoints.save(manager, state, checkpoints.Progress({}, 8, step, 0.0), keep=2)
        print("saved", step, flush=True)
"""

    def state(step):
        arrays = {str(i): jax.numpy.ones((256, 256)) for i in range(60)}
        return checkpoints.TrainState(jax.numpy.int32(step), arrays, {}, {}, jax.numpy.zeros(2))

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0)
    )
    cut_short = 0
    for delay in (0.001, 0.01, 0.03):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        while not any("tmp" in path.name for path in tmp_path.iterdir()):
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        newest = int(lines[-1].split()[-1])
        cut_short += any("tmp" in path.name for path in tmp_path.iterdir())
        with checkpoints.open_checkpoints(tmp_path) as manager:
            found = checkpoints.restore(manager, abstract)
            assert found is not None
            assert found[1].tokens == int(found[0].step) in (newest, newest + 1)
    assert cut_short
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, state(1000), Progress(None, 8, 0, 0.0))
    assert not any("tmp" in path.name for path in tmp_path.iterdir())


def test_a_folder_without_a_run_is_told(tmp_path, model):
    with pytest.raises(RunError, match="not the folder of a run"):
        load_run(tmp_path)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunError, match="not reached its first"):
            checkpoints.restore_model(folder, model.abstract_state)
