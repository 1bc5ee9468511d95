"""The machine: one core or one accelerator, and how it is described. Imports no jax by itself."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform as python_platform
import subprocess
import sys
from pathlib import Path

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def detect_platform() -> str:
    """Returns ``cpu`` or ``gpu``: what jax computes on by default.

    Asked of another process, as this one must be pinned before jax starts its threads.
    """
    program = "import jax; print(jax.default_backend())"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.split()[-1]


def use_one_core() -> None:
    """Pins this process to one core and its libraries to one thread; before jax is imported."""
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before the process was pinned to one core.")
    flags = os.environ.get("XLA_FLAGS", "")
    if ONE_THREAD not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ONE_THREAD}".strip()
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def share_the_accelerator() -> None:
    """Leaves memory to other libraries on the same device; before jax is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def prepare(platform: str, *, all_cores: bool = False) -> None:
    """Makes this process measure as it should on ``platform``; before jax is imported."""
    if platform != "cpu":
        share_the_accelerator()
    elif not all_cores:
        use_one_core()


def describe_machine(platform: str, command: str) -> dict[str, str | int]:
    """Returns what a reader needs to judge the figures: machine, versions, command, date."""
    import jax

    device = jax.devices()[0]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "platform": platform,
        "device": device.device_kind,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "python": python_platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "torch", "performer-pytorch")},
    }


def memory_limit() -> int:
    """Returns the bytes that a program may take: half of what the device has."""
    import jax

    statistics = jax.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cpu_model() -> str:
    """Returns the processor's name as the system has it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return python_platform.processor() or python_platform.machine()


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def version(distribution: str) -> str:
    """Returns an installed version, or ``not installed``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
