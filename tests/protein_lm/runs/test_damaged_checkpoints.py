"""Damaged checkpoints give way to others, and are named."""

import errno
import gc
import json
import re
import shutil
from pathlib import Path

import pytest
import tensorstore

from fast_attention.protein_lm.cli.failures import describe_failure
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.runs import checkpoints
from fast_attention.protein_lm.runs.array_records import seal
from fast_attention.protein_lm.runs.checkpoints import Progress
from tests.protein_lm.runs.checkpoint_cases import at_step, files_of, make, read, resume


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
