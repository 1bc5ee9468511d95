import pytest

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.runs.metrics_log import read_metrics
from tests.protein_lm.killing import end, figures, start, train_arguments, wait_for

pytestmark = pytest.mark.slow


def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path):
    """SIGKILL amid steps before the first checkpoint, and as a later one is being written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    checkpoints = killed / "checkpoints"

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
    assert cli.main(train_arguments(whole, 60)) == 0
    for moment in (has_rows, is_writing):
        process = start(train_arguments(killed, 60))
        try:
            wait_for(moment, process)
        finally:
            status, _, _ = end(process)
        assert status == -9
        assert not (killed / "result.json").exists()

    process = start(train_arguments(killed, 60))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "resuming" in out
    assert figures(killed) == figures(whole)
    steps = [row["step"] for row in read_metrics(killed / "metrics.jsonl")]
    assert sorted({*steps}) == list(range(5, 61, 5))
