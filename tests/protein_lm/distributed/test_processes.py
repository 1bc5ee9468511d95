import numpy as np
import pytest

from fast_attention.protein_lm import cli, make_protein_domain
from fast_attention.protein_lm.distributed import processes
from fast_attention.protein_lm.modeling import pipeline
from fast_attention.protein_lm.runs import array_records
from tests.protein_lm.killing import (
    end,
    figures,
    finish,
    free_port,
    start,
    start_all,
    train_arguments,
    wait_for,
)

pytestmark = pytest.mark.slow

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def rows_of(folder) -> tuple[list, np.ndarray]:
    """What is equal in any order of adding, and what is nearly so."""
    rows = figures(folder)
    assert rows
    exact = [(row[0], row[1], row[6]) for row in rows]
    return exact, np.array([[value or 0.0 for value in row[2:6]] for row in rows], float)


def test_two_processes_train_as_one_does(tmp_path):
    """One of two processes is killed, and one process of two devices goes on alone."""
    arguments = {name: train_arguments(tmp_path / name, 30) for name in ("two", "one")}
    alone = start_all(arguments["one"], 1, **TWO_DEVICES)
    killed, other = start_all(arguments["two"], 2)
    wait_for(lambda: len(figures(tmp_path / "two")) > 2, killed, other)
    assert end(killed)[0] == -9
    ((status, _, err),) = finish([other])
    assert status == 1
    assert "another process of this run was lost" in err
    assert "The checkpoint of step 10 is complete" in err or "of step 20 is complete" in err
    for status, _, err in finish([*alone, *start_all(arguments["two"], 1, **TWO_DEVICES)]):
        assert status == 0, err
    exact, near = rows_of(tmp_path / "two")
    expected = rows_of(tmp_path / "one")
    assert exact == expected[0]
    np.testing.assert_allclose(near, expected[1], rtol=1e-4)


def test_processes_of_different_lengths_end(tmp_path):
    """The shorter one would wait at its last step for the other."""
    joining = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    running = [
        start([*train_arguments(tmp_path / "run", steps), *joining, f"--process_id={index}"])
        for index, steps in enumerate((10, 20))
    ]
    for status, _, err in finish(running, 300):
        assert status == 1 and "give all of them the same --steps and --epochs" in err, err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--coordinator=localhost:1234"], "--num_processes, --process_id missing"),
        (["--num_processes=2", "--process_id=0"], "--coordinator missing"),
        (["--coordinator=localhost", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
        (["--coordinator=a:70000", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "from 0 to 1"),
        (["--distributed", "--process_id=0"], "finds the other processes"),
    ],
)
def test_what_does_not_name_the_processes_is_told(given, told, tmp_path, capsys):
    assert cli.main(["train", f"--work_dir={tmp_path / 'run'}", *given]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_numbers_of_processes_and_seconds_are_checked_in_python_too():
    with pytest.raises(ValueError, match="num_processes must be at least 1"):
        processes.joined("a:1", 0, 0).__enter__()
    with pytest.raises(ValueError, match="at least 1 second"):
        processes.joined(timeout=0).__enter__()


def test_a_process_that_waits_in_vain_tells_what_to_look_at(tmp_path):
    joining = ["--num_processes=2", "--join_timeout=1", "--coordinator=localhost:9"]
    arguments = ["train", f"--work_dir={tmp_path / 'run'}", *joining, "--process_id=1"]
    ((status, _, err),) = finish(start_all(arguments, 1))
    assert status == 1
    assert "process 0 was not reached at localhost:9" in err and len(err.splitlines()) < 4


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_each_process_builds_its_rows_of_the_same_batches(objective, tiny_fasta):
    """Also of the last batch, which is not full, and of a mixture of files."""

    def batches(rows, files):
        domain = make_protein_domain(length=64, include_mask=True)
        options = {"length": 64, "batch_size": 6, "seed": 3, "num_epochs": 1, "rows": rows}
        return list(pipeline.make_dataset(files, domain, objective=objective, **options))

    for files in (tiny_fasta, {tiny_fasta: 2.0}):
        whole = batches(None, files)
        for rows in ((0, 2), (2, 5), (5, 6)):
            for batch, part in zip(whole, batches(rows, files), strict=True):
                for name, values in batch.items():
                    np.testing.assert_array_equal(part[name], values[slice(*rows)], err_msg=name)
    for rows in ((2, 2), (0, 7), (-1, 2)):
        with pytest.raises(ValueError, match="rows must be"):
            batches(rows, tiny_fasta)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8", "bool"])
def test_sums_do_not_depend_on_how_an_array_is_cut(dtype):
    values = np.random.default_rng(0).integers(-3, 4, (5, 7, 3)).astype(np.dtype(dtype))
    whole = array_records.checksums({"x": values})["x"]
    total = 0
    for first in (slice(0, 2), slice(2, 5)):
        for last in (slice(0, 1), slice(1, 3)):
            index = (first, slice(None), last)
            total += int(array_records._weighted_sum(values[index], index, values.shape))
    assert total % 2**32 == whole
    flipped = values.copy()
    flipped.view(np.uint8).reshape(-1)[-1] ^= 1
    assert array_records.checksums({"x": flipped})["x"] != whole
    swapped = values[::-1]
    assert array_records.checksums({"x": swapped})["x"] != whole
