"""Runs tasks until the time is up, and keeps each result as soon as it is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import environment

Task = Callable[[], Any]
"""Returns what JSON can hold."""


def run_tasks(tasks: Mapping[str, Task], folder: Path, seconds: float, command: str) -> int:
    """Runs the tasks whose results are not in the folder yet.

    Args:
      tasks: by name, the most valuable first. One that raises leaves the error as its result, and
        is tried again by the next run.
      folder: of the results, made if it is not there.
      seconds: no task is started after these.
      command: for the record.

    Returns:
      The number of tasks without a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    _write(folder / "machine.json", machine(command))
    options = {
        "jax_compilation_cache_dir": str((folder / "compiled").absolute()),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        for name, task in tasks.items():
            path = folder / f"{name}.json"
            if _done(path):
                continue
            if time.monotonic() > end:
                break
            start = time.monotonic()
            try:
                result = {"result": task()}
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"[:2000]}
            _write(path, result | {"seconds": round(time.monotonic() - start, 2)})
            print(f"{name}: {json.dumps(result)[:300]}", flush=True)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    return sum(not _done(folder / f"{name}.json") for name in tasks)


def machine(command: str) -> dict[str, Any]:
    """Returns device, driver and versions."""
    device = jax.devices()[0]
    found: dict[str, Any] = dict(environment.describe_machine(device.platform, command))
    found["devices"] = len(jax.devices())
    found["compute_capability"] = str(getattr(device, "compute_capability", ""))
    found["runtime"] = device.client.platform_version
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
        )
        found["nvidia_smi"] = done.stdout.strip()
    return found


def _done(path: Path) -> bool:
    return path.exists() and "result" in json.loads(path.read_text())


def _write(path: Path, content: Any) -> None:
    # A run may be stopped at any moment; half a file would not be read again.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
