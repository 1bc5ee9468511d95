"""Threads for a CPU that stands for several devices.

XLA runs all such devices, and the parts of what each of them computes, on one pool of as many
threads as there are processors. Where those are no more than the devices, each of which holds a
thread while it waits for its parts, all can wait forever.
"""

from __future__ import annotations

import os
import re

POOL = "NPROC"
"""The environment variable from which XLA takes the size of its pool."""


def provide_threads() -> None:
    """Makes the pool large enough for the devices that a CPU stands for; before JAX uses it.

    Does nothing with one such device, or if the variable ``NPROC`` is set already.
    """
    devices = simulated_devices()
    if devices > 1:
        os.environ.setdefault(POOL, str(2 * devices + (os.cpu_count() or 1)))


def simulated_devices() -> int:
    """How many devices one CPU was asked to stand for."""
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    asked = [os.environ.get("JAX_NUM_CPU_DEVICES", "")]
    asked += re.findall(flag, os.environ.get("XLA_FLAGS", ""))
    return max((int(number) for number in asked if number.isdecimal()), default=1)
