"""The table of chunk sizes: measured, written, kept and read."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from benchmarks import chunk_sizes
from benchmarks.settings import Setting

ORIGIN = ("python -m benchmarks.chunk_sizes", 'a "machine"', "today")


def load(path) -> dict:
    loaded: dict = {}
    exec(path.read_text(), loaded)
    return loaded


def test_the_writer_keeps_the_rows_of_other_devices(tmp_path):
    path = tmp_path / "chunk_table.py"
    shutil.copy(chunk_sizes.TABLE, path)
    before = load(path)
    found = {("cpu", True, 4, 8): (16, 2, "measured"), ("cpu", False, 4, 8): (32, 1, "measured")}
    chunk_sizes.rewrite(path, "cpu", found, ORIGIN)
    after = load(path)
    others = {row: choice for row, choice in before["CHUNKS"].items() if row[0] != "cpu"}
    assert others
    assert after["CHUNKS"] == others | found
    assert after["ORIGINS"] == before["ORIGINS"] | {("cpu", "measured"): ORIGIN}
    assert after["__doc__"] == before["__doc__"]


def test_the_table_is_as_the_writer_writes_it(tmp_path):
    path = tmp_path / "chunk_table.py"
    shutil.copy(chunk_sizes.TABLE, path)
    table = load(path)
    found = {row: choice for row, choice in table["CHUNKS"].items() if row[0] == "cpu"}
    chunk_sizes.rewrite(path, "cpu", found, table["ORIGINS"]["cpu", "measured"])
    assert path.read_text() == chunk_sizes.TABLE.read_text()
    done = subprocess.run([sys.executable, "-m", "ruff", "format", "--check", str(path)])
    assert done.returncode == 0


def test_candidates_are_measured_up_to_the_length(monkeypatch):
    monkeypatch.setattr(chunk_sizes, "UNROLLS", (2,))
    shape = Setting(length=16, heads=2, head_dim=4, features=8)
    times = chunk_sizes.measure(shape, False, (8, 16, 32), 3, wall=True)
    assert set(times) == {(8, 2), (16, 2)}
    assert all(seconds > 0 for seconds in times.values())


@pytest.mark.parametrize(
    "times, expected",
    [
        ({(8, 1): 1.0, (16, 1): 2.0}, (8, 1)),
        ({(8, 1): 1.2, (16, 1): 1.0}, (16, 1)),
        ({(8, 2): 1.0, (16, 1): 1.01, (32, 1): 1.005}, (16, 1)),
        ({(8, 2): 1.0, (16, 1): 1.1}, (8, 2)),
    ],
)
def test_the_simplest_of_the_best_is_taken(times, expected):
    assert chunk_sizes.best(times) == expected
