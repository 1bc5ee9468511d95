import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fast_attention.protein_lm import cli, train
from fast_attention.protein_lm.metrics_log import read_metrics
from fast_attention.protein_lm.training_loop import Times

EXPECTED_FILES = {
    "baselines.npz",
    "checkpoints",
    "config.gin",
    "curve.png",
    "metrics.jsonl",
    "result.json",
    "tensorboard",
    "vocabulary.json",
}


def losses(folder: Path) -> list[tuple]:
    return [
        (row["step"], row["split"], row["loss"], row["accuracy"], row.get("gradient_norm"))
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def steps_of(folder: Path, split: str) -> list[int]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [row["step"] for row in rows if row["split"] == split]


def test_a_run_leaves_a_whole_folder(lm_run):
    assert {path.name for path in lm_run.iterdir()} == EXPECTED_FILES
    assert {path.name for path in (lm_run / "checkpoints").iterdir()} == {"8", "12"}
    assert steps_of(lm_run, "train") == [3, 4, 6, 8, 9, 12]
    assert steps_of(lm_run, "valid") == [6, 12]
    rows = read_metrics(lm_run / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    result = json.loads((lm_run / "result.json").read_text())
    assert (result["model"], result["steps"], len(result["samples"])) == ("FlaxLM", 12, 3)
    assert (lm_run / "curve.png").read_bytes().startswith(b"\x89PNG")
    vocabulary = json.loads((lm_run / "vocabulary.json").read_text())
    assert len(vocabulary["tokens"]) == 29
    config = (lm_run / "config.gin").read_text()
    assert "FlaxModel.attention_fn = @make_fast_softmax_attention()" in config
    assert "make_fast_softmax_attention.nb_features = 16" in config


def test_a_masked_run_has_no_samples(bert_run):
    result = json.loads((bert_run / "result.json").read_text())
    assert (result["model"], result["samples"]) == ("FlaxBERT", [])
    assert result["evaluation"]["objective"] == "masked"


def test_a_finished_run_tells_its_result_again(lm_run, train_arguments, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in lm_run.iterdir()}
    assert cli.main(train_arguments(lm_run)) == 0
    told = capsys.readouterr().out
    table = ("this model", "perplexity", "unigram", "bigram", "uniform", "sampled proteins")
    for expected in ("finished", *table, str(lm_run)):
        assert expected in told
    assert {path.name: path.stat().st_mtime_ns for path in lm_run.iterdir()} == before


def test_other_settings_on_a_run_are_refused(lm_run, train_arguments, capsys):
    assert cli.main(train_arguments(lm_run, "FlaxModel.mlp_dim = 128")) == 1
    told = capsys.readouterr().err
    assert "-FlaxModel.mlp_dim = 64" in told and "+FlaxModel.mlp_dim = 128" in told
    assert "--work_dir" in told


def test_an_interrupted_run_resumes_as_if_nothing_had_happened(
    lm_run, train_arguments, tmp_path, monkeypatch, capsys
):
    """Stopped after step 11, resumed from the checkpoint of step 8."""
    calls = []
    save = train.checkpoints.save

    def stop_at_the_end(manager, state, progress, **options):
        calls.append(int(state.step))
        if calls[-1] == 12:
            raise KeyboardInterrupt
        save(manager, state, progress, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoints, "save", stop_at_the_end)
        assert cli.main(train_arguments(tmp_path)) == 130
    assert calls == [4, 6, 8, 12]
    assert steps_of(tmp_path, "train")[-1] == 12
    with open(tmp_path / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 13, "spl')
    assert "same command" in capsys.readouterr().err
    assert cli.main(train_arguments(tmp_path)) == 0
    assert "after step 8" in capsys.readouterr().out
    assert losses(tmp_path) == losses(lm_run)
    results = [json.loads((path / "result.json").read_text()) for path in (lm_run, tmp_path)]
    for result in results:
        assert result.pop("seconds") > 0
    assert results[0] == results[1]


def test_another_number_of_devices_is_refused(lm_run, train_arguments, tmp_path):
    """Its batches would be others."""
    shutil.copytree(lm_run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    process = start(train_arguments(tmp_path / "run"), JAX_NUM_CPU_DEVICES="2")
    _, told = process.communicate()
    assert process.returncode == 1
    assert "4 rows" in told and "device count of this machine (2)" in told


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fast_attention.protein_lm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(train_arguments, tmp_path, capsys):
    settings = [
        "create_learning_rate_scheduler.factors = 'constant * decay_every'",
        "create_learning_rate_scheduler.decay_factor = 1e12",
        "create_learning_rate_scheduler.steps_per_decay = 5",
    ]
    assert cli.main(train_arguments(tmp_path, *settings)) == 1
    told = capsys.readouterr().err
    assert "diverged" in told and "learning rate" in told
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}
    assert steps_of(tmp_path, "train")[-1] < 12


def test_epochs_end_a_run(train_arguments, tmp_path, capsys):
    settings = ["experiment.epochs = 1", "experiment.max_train_steps = 10000"]
    settings += ["experiment.batch_size_per_device = 150"]
    assert cli.main(train_arguments(tmp_path, *settings)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert 1 <= result["steps"] <= 4
    # Every protein once, cropped to 64, with its end where the crop has it.
    assert result["tokens"] == 500 * 64 - missing(64)
    assert steps_of(tmp_path, "valid")[-1] == result["steps"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {str(result["steps"])}


def missing(length: int) -> int:
    from fast_attention.protein_lm import read_fasta
    from fast_attention.protein_lm.corpus import bundled_corpus

    sizes = [len(record.sequence) + 1 for record in read_fasta(bundled_corpus("tiny"))]
    return sum(length - min(size, length) for size in sizes)


def test_settings_that_nothing_uses_are_told(lm_run, train_arguments, tmp_path, capsys):
    cli.main(train_arguments(lm_run, "make_fast_generalized_attention.nb_features = 8"))
    told = capsys.readouterr().err
    assert "warning" in told and "make_fast_generalized_attention.nb_features" in told


@pytest.mark.parametrize("name", ["total", "summary", "evaluation", "checkpoint"])
def test_times_must_be_positive(name):
    numbers = {"total": 1, "summary": 1, "evaluation": 1, "checkpoint": 1} | {name: 0}
    with pytest.raises(ValueError, match=name):
        Times(**numbers)
