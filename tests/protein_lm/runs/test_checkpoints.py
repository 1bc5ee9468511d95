import dataclasses
import errno
import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
import tensorstore

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.cli.failures import describe_failure
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.runs import checkpoints
from fast_attention.protein_lm.runs.array_records import seal
from fast_attention.protein_lm.runs.checkpoints import Progress
from fast_attention.protein_lm.runs.run_folder import RunFolder

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


@pytest.fixture(scope="module")
def three_checkpoints(model, tmp_path_factory):
    """Checkpoints of the steps 3, 6 and 9, the best of them 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with checkpoints.open_checkpoints(folder) as manager:
        for step in (3, 6, 9):
            progress = Progress(None, 8, step, 0.0, best_step=min(step, 6), best_loss=1.0)
            checkpoints.save(manager, at_step(model, step), progress)
    return folder


@pytest.fixture
def stored(three_checkpoints, tmp_path):
    return Path(shutil.copytree(three_checkpoints, tmp_path / "checkpoints"))


def read(folder, model, checkpoint: str | int = "best") -> int:
    found = checkpoints.restore_model(folder, model.abstract_state, checkpoint=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, found.parameters, model.state.parameters)
    return found.step


def resume(folder, model) -> int | None:
    with checkpoints.open_checkpoints(folder) as manager:
        found = checkpoints.restore(manager, model.abstract_state)
        return None if found is None else int(found[0].step)


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


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max(files_of(folder), key=lambda path: path.stat().st_size)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_large_arrays_that_are_damaged_give_way_too(tmp_path, capsys):
    """Where an array is described well and its numbers are damaged, orbax has another error."""
    wide = make(emb_dim=64, mlp_dim=128)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for step in (3, 6):
            checkpoints.save(manager, at_step(wide, step), Progress(None, 8, step, 0.0))
    base = {"driver": "file", "path": f"{tmp_path / '6' / 'model'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    chunk = max((store.read(key).result().value for key in store.list().result()), key=len)
    assert len(chunk) > 10_000
    path = next(path for path in files_of(tmp_path / "6" / "model") if chunk in path.read_bytes())
    content = path.read_bytes()
    for place in (0, len(chunk) // 2):
        damaged = bytearray(content)
        start = content.index(chunk) + place
        damaged[start : start + 20] = bytes(byte ^ 0x55 for byte in content[start : start + 20])
        path.write_bytes(damaged)
        assert read(tmp_path, wide, "last") == 3
        assert "6 is damaged" in capsys.readouterr().err
        with pytest.raises(RunError, match=r"^.*6 is damaged .*$"):
            read(tmp_path, wide, 6)
    path.write_bytes(content)
    assert read(tmp_path, wide) == 6
    # Lets asyncio report here what orbax left unread.
    gc.collect()


def test_chunks_of_absurd_size_are_refused_before_memory_is_taken(stored, model, capsys):
    base = {"driver": "file", "path": f"{stored / '9' / 'model'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = next(key for key in store.list().result() if key.endswith(b".zarray"))
    about = json.loads(store.read(key).result().value)
    about["chunks"] = [2**17 for _ in about["chunks"]]
    store.write(key, json.dumps(about).encode()).result()
    assert read(stored, model, "last") == 6
    assert "chunks larger than the array" in capsys.readouterr().err
    # Arrays beside the database would not be looked at.
    path = stored / "6" / "model" / "_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_ocdbt": False}))
    assert read(stored, model, "last") == 3
    assert "use_ocdbt is not true" in capsys.readouterr().err


def test_folders_may_have_any_path(stored, model, tmp_path, monkeypatch):
    odd = tmp_path / "a b\n%20é#?*"
    shutil.copytree(stored, odd / "stored")
    (tmp_path / "link").symlink_to(odd.name)
    monkeypatch.chdir(odd)
    for path in (odd / "stored", Path("stored"), Path("..", "link", "..", odd.name, "stored")):
        assert read(path, model) == 6
    assert resume(Path("..", "link", "stored"), model) == 9


def write_about(folder: Path, fields: dict, progress: dict) -> None:
    """Changes what stands beside the arrays, as somebody does who knows the checksum."""
    path = folder / "about" / "metadata"
    about = json.loads(path.read_text())
    about["progress"] |= progress
    about |= fields
    del about["seal"]
    path.write_text(json.dumps(about | {"seal": seal(about)}))


@pytest.mark.parametrize(
    ("fields", "progress", "told"),
    [
        ({"arrays": []}, {}, "arrays is .*expected an object"),
        ({"sums": [1]}, {}, "sums is .*expected an object"),
        ({"sums": {}}, {}, "is not what was written"),
        ({"progress": {}}, {}, "progress.iterator is missing"),
        ({"more": 1}, {}, "more is unknown"),
        ({}, {"tokens": "many"}, "progress.tokens is .*expected an integer"),
        ({}, {"batch_size": -1}, "progress.batch_size is -1; expected 1"),
        ({}, {"best_step": [1]}, "progress.best_step is"),
        ({}, {"iterator": [1]}, "progress.iterator is"),
    ],
    ids=str,
)
def test_what_stands_beside_the_arrays_is_checked(stored, model, capsys, fields, progress, told):
    write_about(stored / "9", fields, progress)
    assert read(stored, model, "best") == 6
    capsys.readouterr()
    assert read(stored, model, "last") == 6
    assert re.search(f"9 is damaged .*{told}", capsys.readouterr().err)
    assert resume(stored, model) == 6


def test_two_checkpoints_that_call_each_other_the_best_are_read(stored, model, capsys):
    write_about(stored / "6", {}, {"best_step": 9})
    assert read(stored, model) == 6
    assert "recursion" not in capsys.readouterr().err


def test_only_folders_with_a_number_are_checkpoints(stored, model):
    (stored / "12").write_text("")
    for name in ("007", "15.tmp", "\N{ARABIC-INDIC DIGIT NINE}"):
        (stored / name).mkdir()
    folder = RunFolder(stored.parent)
    assert folder.steps_kept() == [3, 6, 9]
    assert folder.newest_step() == read(stored, model, "last") == 9


# Orbax leaves its other reads behind when one fails; they end as "unraisable" exceptions.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [cut, change, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stored, model, damage, capsys):
    damage(largest(stored / "9" / "model"))
    assert read(stored, model, "last") == 6
    told = capsys.readouterr().err
    assert "9 is damaged" in told and "step 6 is taken instead" in told
    damage(largest(stored / "6" / "about"))
    assert read(stored, model, "last") == 3
    assert "6 is damaged" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_resumes_from_before_a_damaged_checkpoint(stored, model, capsys):
    for path in files_of(stored / "9" / "training"):
        cut(path)
    with checkpoints.open_checkpoints(stored) as manager:
        found = checkpoints.restore(manager, model.abstract_state)
        assert found is not None and int(found[0].step) == found[1].tokens == 6
        # The place of the damaged one is free.
        checkpoints.save(manager, at_step(model, 9), Progress(None, 8, 9, 0.0))
    assert "9 is damaged" in capsys.readouterr().err
    assert {"6", "9", "9.damaged"} <= {path.name for path in stored.iterdir()}
    assert resume(stored, model) == 9
    assert not capsys.readouterr().err


def test_a_damaged_best_checkpoint_gives_way_to_the_newest(stored, model, capsys):
    for path in files_of(stored / "6" / "model"):
        cut(path)
    assert read(stored, model) == 9
    assert "6 is damaged" in capsys.readouterr().err
    with pytest.raises(RunError, match="6 is damaged"):
        read(stored, model, 6)


def test_nothing_but_damaged_checkpoints_is_an_error(stored, model):
    for step in ("3", "6", "9"):
        shutil.rmtree(stored / step / "about")
    for what in (lambda: read(stored, model), lambda: resume(stored, model)):
        with pytest.raises(RunError, match="all 3 checkpoints .* damaged"):
            what()
    assert {"3", "6", "9"} <= {path.name for path in stored.iterdir()}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (ValueError('Error reading "a" [OS error 5: EIO Input/output error]'), "read error"),
        (OSError(errno.ESTALE, "Stale file handle"), "read error"),
        (OSError(errno.EINTR, "Interrupted system call"), "read error"),
    ],
    ids=["memory", "input_output", "stale", "interrupted"],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    stored, model, monkeypatch, capsys, error, reason
):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp.CheckpointManager, "restore", fail)
        for what in (lambda: read(stored, model, "last"), lambda: resume(stored, model)):
            with pytest.raises(RunError) as caught:
                what()
            told = describe_failure(caught.value)
            assert reason in told and "damaged" not in told
            assert str(stored / "9") in told
    assert not capsys.readouterr().err
    # Nothing was put aside, and no older checkpoint was taken.
    assert resume(stored, model) == 9


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
