import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.runs.metrics_log import MetricsLog, read_metrics
from fast_attention.protein_lm.training import train
from tests.protein_lm import killing

EXPECTED_FILES = {
    "baselines.npz",
    "checkpoints",
    "config.gin",
    "curve.png",
    "data.json",
    "metrics.jsonl",
    "model.json",
    "result.json",
    "tensorboard",
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
    assert all(0 <= row["data_wait"] <= 1 for row in rows if row["split"] == "train")
    result = json.loads((lm_run / "result.json").read_text())
    assert (result["model"], result["steps"], len(result["samples"])) == ("FlaxLM", 12, 3)
    assert (lm_run / "curve.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((lm_run / "model.json").read_text())
    assert len(about["alphabet"]["tokens"]) == 29
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


def test_a_run_told_to_stop_saves_its_step_and_goes_on(
    lm_run, train_arguments, tmp_path, monkeypatch, capsys
):
    """Between rows of metrics, after steps 7 and 10."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for row, number, status in ((6, signal.SIGTERM, 143), (9, signal.SIGINT, 130)):
        write = MetricsLog.write

        def stop(log, step, split, values, row=row, number=number, write=write):
            write(log, step, split, values)
            if step == row:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "write", stop)
            # Twice the same signal, from both rows of step 6, would be obeyed at once.
            patch.setattr(train, "_make_validation", lambda *args: None)
            assert cli.main(train_arguments(tmp_path)) == status
        told = capsys.readouterr().err
        assert f"{number.name} after step {row + 1}, which is saved: run the same command" in told
        assert "configurable" not in told and "<function" not in told
        assert (tmp_path / "checkpoints" / str(row + 1)).is_dir()
        assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert cli.main(train_arguments(tmp_path)) == 0
    expected = [row for row in losses(lm_run) if row[1] == "train" or row[0] > 6]
    assert losses(tmp_path) == expected


def test_training_ends_when_validations_get_no_better(train_arguments, tmp_path):
    settings = ["experiment.early_stopping = 2", "experiment.eval_frequency = 1"]
    settings += ["FlaxModel.learning_rate = 0.0", "FlaxModel.dropout_rate = 0.0"]
    assert cli.main(train_arguments(tmp_path, *settings, "experiment.num_samples = 0")) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["evaluated_step"]) == (3, 1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}
    assert load_run(tmp_path).step == 1
    assert load_run(tmp_path, checkpoint="last").step == 3


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(lm_run, train_arguments, tmp_path):
    """With the batches that it began with, and the losses; and is then read on one device."""
    run = tmp_path / "run"
    shutil.copytree(lm_run, run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "12")
    settings = ["FlaxModel.mesh = @make_mesh()", "make_mesh.fsdp = 2", "experiment.num_samples = 0"]
    config = (run / "config.gin").read_text().replace("num_samples = 3", "num_samples = 0")
    (run / "config.gin").write_text(config)
    process = killing.start(train_arguments(run, *settings), JAX_NUM_CPU_DEVICES="2")
    _, told = process.communicate()
    assert process.returncode == 0, told
    for row, expected in zip(losses(run), losses(lm_run), strict=True):
        assert row[:2] == expected[:2]
        np.testing.assert_allclose(row[2:4], expected[2:4], rtol=1e-5)
    other = load_run(lm_run, checkpoint="last").model.state.parameters
    for found, wanted in zip(
        jax.tree.leaves(load_run(run, checkpoint="last").model.state.parameters),
        jax.tree.leaves(other),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_run_of_many_devices_is_read_on_one(lm_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(lm_run, run)
    text = (run / "model.json").read_text()
    (run / "model.json").write_text(text.replace('"fsdp": 1', '"fsdp": 64'))
    found, expected = (load_run(folder).model for folder in (run, lm_run))
    assert "does not fit the 1 devices here" in capsys.readouterr().err
    assert found.score(["MKT"]) == expected.score(["MKT"])


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(train_arguments, tmp_path, capsys):
    settings = [
        f"create_learning_rate_scheduler.factors = 'constant{' * decay_every' * 6}'",
        "create_learning_rate_scheduler.decay_factor = 100",
        "create_learning_rate_scheduler.steps_per_decay = 5",
    ]
    assert cli.main(train_arguments(tmp_path, *settings)) == 1
    told = capsys.readouterr().err
    assert "diverged at step 6 (batch 5): the validation loss is" in told
    for expected in ("learning rate 3e+09", "gradient norm", "step 4 is kept", "grad_clip"):
        assert expected in told
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}
    assert steps_of(tmp_path, "train")[-1] < 12


def test_epochs_end_a_run(train_arguments, tmp_path, capsys):
    settings = ["experiment.epochs = 1", "experiment.max_train_steps = 10000"]
    settings += ["experiment.batch_size_per_device = 150", "experiment.train_summary_frequency = 1"]
    settings += ["create_learning_rate_scheduler.steps_per_cycle = None"]
    settings += ["create_learning_rate_scheduler.warmup_steps = 0"]
    assert cli.main(train_arguments(tmp_path, *settings)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert 1 <= result["steps"] <= 4
    # The cosine ends with the epoch.
    rows = read_metrics(tmp_path / "metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if row["split"] == "train"]
    fractions = np.arange(len(rates)) / result["steps"]
    np.testing.assert_allclose(rates, 0.003 * (1 + np.cos(np.pi * fractions)) / 2, rtol=1e-5)
    # Every protein once, cropped to 64, with its end where the crop has it.
    assert result["tokens"] == 500 * 64 - missing(64)
    assert steps_of(tmp_path, "valid")[-1] == result["steps"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {str(result["steps"])}


def missing(length: int) -> int:
    from fast_attention.protein_lm import read_fasta
    from fast_attention.protein_lm.data.corpus import bundled_corpus

    sizes = [len(record.sequence) + 1 for record in read_fasta(bundled_corpus("tiny"))]
    return sum(length - min(size, length) for size in sizes)


def test_settings_that_nothing_uses_are_told(lm_run, train_arguments, tmp_path, capsys):
    cli.main(train_arguments(lm_run, "make_fast_generalized_attention.nb_features = 8"))
    told = capsys.readouterr().err
    assert "warning" in told and "make_fast_generalized_attention.nb_features" in told
