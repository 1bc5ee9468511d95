"""Tests marked `devices`, in a process where one CPU stands for four devices.

Not everywhere: on fewer cores than devices XLA's collectives can starve in a long training run.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_on_four_devices():
    arguments = ["--numprocesses=0", "-q", "-m", "devices", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
