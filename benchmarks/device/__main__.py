"""Checks and measures an accelerator: ``python -m benchmarks.device --minutes=8 --out=FOLDER``.

The most valuable comes first: values and gradients of every implementation against XLA in float32,
then speed against exact attention, the best chunk sizes, longer sequences, training. Each result is
a JSON file of its own in ``FOLDER``, written as soon as it is there, and ``machine.json`` has
device, driver and versions. A second run with the same folder goes on where the first one ended;
programs that were compiled are not compiled again. On a CPU everything is small.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environment


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what fits the time."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description="Checks and measures an accelerator in a few minutes; can be resumed.",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after these (8)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(arguments)
    platform = environment.detect_platform()
    environment.prepare(platform, all_cores=True)

    from benchmarks.device.plan import SIZES, tasks_of
    from benchmarks.device.run import run_tasks

    sizes = SIZES["cpu" if platform == "cpu" else "accelerator"]
    command = shlex.join(["python", "-m", "benchmarks.device", *arguments])
    left = run_tasks(tasks_of(platform, sizes), options.out, 60 * options.minutes, command)
    print(f"Results are in {options.out}; {left} of the tasks are left for another run.")


if __name__ == "__main__":
    main()
