"""Tests that need several devices, in a process whose CPU stands for them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from fast_attention.protein_lm.distributed import host_threads

TESTS = Path(__file__).parents[1]


def run_marked(marker: str, count: int) -> None:
    """Runs the tests with a marker on some devices; none may fail or be skipped.

    Only the files that have the marker are collected: importing all would take half a minute.
    """
    marked = re.compile(rf"pytest\.mark\.{marker}\b")
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if marked.search(path.read_text())]
    arguments = ["--numprocesses=0", "-q", "-m", marker, "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(count), host_threads.POOL: str(3 * count)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
