"""The check of a device runs on any, resumes, and keeps what failed apart from what was found."""

import json
import math

import jax

from benchmarks.device.plan import SIZES, tasks_of
from benchmarks.device.run import run_tasks

PLATFORM = jax.default_backend()


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_everything_small(tmp_path):
    tasks = tasks_of("cpu", SIZES["cpu"])
    assert run_tasks(tasks, tmp_path, 3600.0, "a command") == 0
    assert read(tmp_path, "machine")["device"] == jax.devices()[0].device_kind
    for name in tasks:
        found = read(tmp_path, name)["result"]
        if name.startswith("check"):
            limit = 3e-2 if "bfloat16" in name else 3e-5
            assert max(found["relative_errors"].values()) < limit
        elif name != "training":
            for results in found.values():
                assert all(x["milliseconds"] > 0 for x in results.values())
        else:
            assert all(map(math.isfinite, found.values()))


def test_resumed_after_the_time_was_up(tmp_path):
    calls = []

    def fails():
        calls.append("fails")
        if len(calls) == 1:
            raise MemoryError("none left")
        return 7

    tasks = {"fails": fails, "works": lambda: calls.append("works")}
    assert run_tasks(tasks, tmp_path, -1.0, "") == 2
    assert not calls
    assert run_tasks(tasks, tmp_path, 60.0, "") == 1
    assert read(tmp_path, "fails")["error"] == "MemoryError: none left"
    assert run_tasks(tasks, tmp_path, 60.0, "") == 0
    assert read(tmp_path, "fails")["result"] == 7
    assert calls == ["fails", "works", "fails"]
