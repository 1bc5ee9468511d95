import errno
import os

import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_targets import OutputError
from fast_attention.protein_lm.runs import run_folder
from fast_attention.protein_lm.runs.metrics_log import read_metrics
from fast_attention.protein_lm.runs.run_folder import RunFolder, claim
from fast_attention.protein_lm.training import plots


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(run_folder, "write_file", refuse)
    with pytest.raises(OutputError, match="cannot be written to: .*read-only"):
        claim(RunFolder(tmp_path), "", "{}\n")


PLACES = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]


@pytest.mark.parametrize("name", PLACES)
def test_a_pipe_or_a_link_out_in_place_of_a_file_of_a_run_is_refused(tmp_path, name):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    path = getattr(folder, name)
    os.mkfifo(path)
    with pytest.raises(RunError, match=f"{path.name} is not a plain file"):
        getattr(folder, name)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=f"{path.name} is a link that leads out"):
        getattr(folder, name)


def test_the_list_of_left_out_records_stays_in_the_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.skipped("train").symlink_to(tmp_path / "elsewhere.tsv")
    with pytest.raises(RunError, match=r"skipped_train.tsv is a link that leads out"):
        folder.skipped("train")


@pytest.mark.parametrize(
    "line",
    ['{"step": 1, "split": "train", "loss": {}}', '{"step": true, "split": "train"}', "[1]"],
    ids=["object", "boolean", "list"],
)
def test_a_row_of_metrics_has_numbers_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "split": "train", "loss": null}}\n{line}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2 is damaged"):
        read_metrics(path)


def test_rows_without_perplexity_are_not_drawn(tmp_path):
    rows = [{"step": 1, "split": "train"}, {"step": 2, "split": "train", "perplexity": 3.0}]
    plots.plot_learning_curve(tmp_path / "curve.png", rows)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
