"""Tests marked `devices` or `eight_devices`, in processes whose CPU stands for several devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_attention.protein_lm.distributed import host_threads

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("marker", "count"), [("devices", 4), ("eight_devices", 8)])
def test_on_several_devices(marker, count):
    arguments = ["--numprocesses=0", "-q", "-m", marker, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(count), host_threads.POOL: str(3 * count)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
