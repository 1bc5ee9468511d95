"""Kills a training run at random moments, and compares what it leaves with an undisturbed one.

    python -m tests.protein_lm.killing --times=20
    python -m tests.protein_lm.killing --times=10 --processes=2

trains a tiny model once without disturbance, and once with so many kills (SIGKILL, at a random
moment after the start, while the program compiles, steps, validates or saves); every start but the
first resumes. At the end each row of metrics must be the same, bit for bit.

With several processes one of them, at random, is killed: the others must end by themselves, with
an error that says so.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.runs.metrics_log import read_metrics

SETTINGS = {
    "experiment.batch_size_per_device": 4,
    "experiment.max_train_length": 64,
    "experiment.train_summary_frequency": 5,
    "experiment.eval_frequency": 40,
    "experiment.num_eval_steps": 1,
    "experiment.checkpoint_frequency": 10,
    "experiment.checkpoints_to_keep": 2,
    "experiment.num_samples": 0,
    "make_protein_domain.length": 64,
    "FlaxModel.emb_dim": 32,
    "FlaxModel.num_heads": 2,
    "FlaxModel.num_layers": 1,
    "FlaxModel.qkv_dim": 32,
    "FlaxModel.mlp_dim": 64,
    "FlaxModel.dropout_rate": 0.1,
    "FlaxModel.grad_clip": 1.0,
    "FlaxModel.ema_decay": 0.99,
}

LOST = ("another process of this run was lost", "not all processes have connected")
"""What the others tell when one was killed, or was killed before all had met."""


def train_arguments(folder: Path, steps: int) -> list[str]:
    """Arguments of ``protein-lm train`` for a run of a tiny model."""
    settings = [f"--gin_bindings={name} = {value!r}" for name, value in SETTINGS.items()]
    files = [f"--{name}fasta={bundled_corpus('tiny')}" for name in ("", "valid_")]
    return ["train", f"--work_dir={folder}", f"--steps={steps}", *files, *settings]


def start(arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Starts the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fast_attention.protein_lm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start_all(
    arguments: Sequence[str], number: int, **environment: str
) -> list[subprocess.Popen[str]]:
    """Starts the command in so many processes, which join each other."""
    if number == 1:
        return [start(arguments, **environment)]
    joining = [f"--coordinator=localhost:{free_port()}", f"--num_processes={number}"]
    return [
        start([*arguments, *joining, f"--process_id={index}"], **environment)
        for index in range(number)
    ]


def finish(
    processes: Sequence[subprocess.Popen[str]], timeout: float = 600
) -> list[tuple[int, str, str]]:
    """Waits for all; returns the exit status and what was written to stdout and stderr of each."""
    killer = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    killer.start()
    told = [process.communicate() for process in processes]
    killer.cancel()
    return [(process.returncode, *told) for process, told in zip(processes, told, strict=True)]


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> tuple[int, str, str]:
    """Sends a signal; returns the exit status and what was written to stdout and stderr."""
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Waits until something is so, while the run goes on."""
    deadline = time.monotonic() + 600
    while not condition():
        if any(process.poll() is not None for process in processes):
            told = [err for _, _, err in finish(processes, 10)]
            raise AssertionError(f"the run ended before it could be stopped: {told}")
        assert time.monotonic() < deadline
        time.sleep(0.001)


def figures(folder: Path) -> list[tuple[object, ...]]:
    """What must be the same in every row of metrics, which tell of speed, too."""
    names = ("step", "split", "loss", "accuracy", "gradient_norm", "learning_rate", "tokens")
    rows = read_metrics(folder / "metrics.jsonl")
    return [tuple(row.get(name) for name in names) for row in rows]


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="kills (default: 20)")
    parser.add_argument("--steps", type=int, default=400, help="of the run (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="of the run (default: 1)")
    options = parser.parse_args()
    tell = functools.partial(print, flush=True)
    moments = random.Random(options.seed)

    def begin(folder: Path) -> list[subprocess.Popen[str]]:
        arguments = train_arguments(folder, options.steps)
        if options.processes > 1:
            # One that is killed before all have met lets the others wait so long.
            arguments.append("--join_timeout=60")
        return start_all(arguments, options.processes)

    def complete(folder: Path) -> str:
        running = begin(folder)
        found = finish(running, 3600)
        assert not any(status for status, _, _ in found), found
        return found[0][1]

    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        began = time.monotonic()
        complete(whole)
        tell(f"undisturbed: {time.monotonic() - began:.1f} s")

        for kill in range(1, options.times + 1):
            before = figures(killed)
            running = begin(killed)
            # From the middle of the imports on; where the run has ended, kills are of no use.
            wait_for(lambda: (killed / "config.gin").exists(), *running)
            if moments.random() < 0.8:
                wait_for(lambda before=before: len(figures(killed)) > len(before), *running)
            time.sleep(moments.uniform(0, 1))
            victim = running.pop(moments.randrange(len(running)))
            status, _, err = end(victim)
            assert status == -signal.SIGKILL, f"the run ended before kill {kill}: {err}"
            at = time.monotonic()
            for status, _, err in finish(running):
                assert status == 1 and any(text in err for text in LOST), (status, err)
            after = f", the others ended in {time.monotonic() - at:.1f} s" if running else ""
            steps = [row[0] for row in figures(killed)]
            kept = sorted(path.name for path in (killed / "checkpoints").glob("*"))
            tell(f"kill {kill}: metrics to step {max(steps, default=0)}, checkpoints {kept}{after}")

        assert "resuming" in complete(killed)
        expected, found = figures(whole), figures(killed)
        unlike = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
        assert not unlike, f"{len(unlike)} rows differ, such as {unlike[0]}"
        tell(f"after {options.times} kills: {len(found)} rows of metrics, all bit-equal")


if __name__ == "__main__":
    main()
