import os
import signal
import subprocess
import time

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.metrics_log import read_metrics
from tests.protein_lm.test_train import losses, start, steps_of


def test_a_killed_run_resumes_as_if_nothing_had_happened(train_arguments, tmp_path):
    """SIGKILL amid steps before the first checkpoint, and as a later one is being written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    checkpoints = killed / "checkpoints"

    def settings(folder):
        return train_arguments(
            folder,
            "experiment.max_train_steps = 100",
            "experiment.num_samples = 0",
            "experiment.checkpoint_frequency = 10",
            "experiment.train_summary_frequency = 5",
            "experiment.eval_frequency = 40",
        )

    def whole_checkpoints() -> list[int]:
        if not checkpoints.is_dir():
            return []
        return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())

    def has_rows() -> bool:
        return bool(read_metrics(killed / "metrics.jsonl"))

    def is_writing() -> bool:
        later = any(step > 20 for step in whole_checkpoints())
        return later and any("tmp" in path.name for path in checkpoints.iterdir())

    # First, so that what it compiles is there for the others.
    assert cli.main(settings(whole)) == 0
    for moment in (has_rows, is_writing):
        process = start(settings(killed))
        try:
            wait_for(moment, process)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "result.json").exists()

    process = start(settings(killed))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "resuming" in out
    assert losses(killed) == losses(whole)
    assert steps_of(killed, "train") == list(range(5, 101, 5))


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
