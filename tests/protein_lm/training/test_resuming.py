import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from fast_attention.protein_lm import cli, read_fasta, write_fasta
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation import evaluation
from fast_attention.protein_lm.runs.metrics_log import MetricsLog, read_metrics
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.training import resuming, train


@pytest.fixture
def finished(lm_run, tmp_path) -> Path:
    """A copy of a finished run of 12 steps."""
    return Path(shutil.copytree(lm_run, tmp_path / "run"))


@pytest.fixture
def other_fasta(tiny_fasta, tmp_path) -> Path:
    path = tmp_path / "other.fasta"
    write_fasta(path, list(read_fasta(tiny_fasta))[:300])
    return path


def figures(folder: Path) -> list[tuple]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["split"], row["loss"], row["accuracy"]) for row in rows]


def result(folder: Path) -> dict:
    return {**json.loads((folder / "result.json").read_text()), "seconds": None}


def test_a_finished_run_answers_without_reading_its_data_and_names_damage(
    finished, train_arguments, monkeypatch, capsys
):
    def read(*arguments, **options):
        raise AssertionError("the data is read")

    monkeypatch.setattr(train, "load_training_data", read)
    monkeypatch.setattr("fast_attention.protein_lm.runs.data_record.describe_files", read)
    assert cli.main(train_arguments(finished)) == 0
    assert "is finished" in capsys.readouterr().out
    (finished / "result.json").write_text('{"model": ')
    assert cli.main(train_arguments(finished)) == 1
    assert "result.json is damaged: remove it" in capsys.readouterr().err
    (finished / "result.json").unlink()
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for damage in (b"\0" * 20 + b"\n", b"[1]\n", b'{"step": 1}\n', b"\xff\n"):
        (finished / "metrics.jsonl").write_bytes(b"".join([lines[0], damage, *lines[1:]]))
        with pytest.raises(RunError, match=r"metrics.jsonl, line 2 is damaged: remove that line"):
            read_metrics(finished / "metrics.jsonl")
    (finished / "data.json").write_text('{"train": 3}')
    monkeypatch.undo()
    assert cli.main(train_arguments(finished)) == 1
    assert "data.json is damaged" in capsys.readouterr().err


def test_a_finished_run_is_trained_further_and_never_less(finished, train_arguments, capsys):
    before = figures(finished)
    longer = train_arguments(finished, "experiment.num_samples = 3") + ["--steps=16"]
    assert cli.main(longer) == 0
    told = capsys.readouterr()
    assert "after step 12" in told.out and "from step 12 to step 16: the learning rate" in told.err
    # The settings of these tests ask for a longer cosine.
    assert "ends at step 104" in told.err and "this run has 16 steps" in told.err
    assert figures(finished)[: len(before)] == before
    assert figures(finished)[-1][0] == result(finished)["steps"] == 16
    assert "experiment.max_train_steps = 16" in (finished / "config.gin").read_text()
    assert cli.main(train_arguments(finished)) == 1
    assert "more steps, not fewer" in capsys.readouterr().err
    assert cli.main(longer) == 0
    assert "is finished" in capsys.readouterr().out


def test_data_is_told_apart_by_content_and_not_by_name(
    finished, train_arguments, tiny_fasta, other_fasta, tmp_path, monkeypatch, capsys
):
    def arguments(path, *more):
        return [
            argument.replace(tiny_fasta, str(path)) for argument in train_arguments(finished)
        ] + list(more)

    shutil.copy(tiny_fasta, tmp_path / "moved.gz")
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments("moved.gz")) == 0
    assert "is finished" in capsys.readouterr().out
    assert cli.main(arguments(other_fasta)) == 1
    assert f"{other_fasta} has" in capsys.readouterr().err
    assert cli.main(arguments(other_fasta, "--new_data")) == 1
    assert "give a larger --steps or --epochs" in capsys.readouterr().err
    (finished / "result.json").unlink()
    assert cli.main(arguments(other_fasta)) == 1
    told = capsys.readouterr().err
    assert "holds a run on other data (train: " in told and "--new_data" in told

    baselines = (finished / "baselines.npz").read_bytes()
    more = ("--new_data", "--steps=14")
    assert cli.main(arguments(other_fasta, *more)) == 0
    record = json.loads((finished / "data.json").read_text())
    assert record["train"][0]["file"] == str(other_fasta)
    assert (record["from_step"], record["proteins"]["train"]) == (12, 300)
    assert record["before"]["train"][0]["file"] == tiny_fasta
    assert (finished / "baselines.npz").read_bytes() != baselines
    assert result(finished)["evaluated_step"] == 14


def test_a_signal_after_the_last_step_is_honoured(
    lm_run, train_arguments, tmp_path, monkeypatch, capsys
):
    """In the last validation, which is followed by a save, and in the evaluation at the end."""
    write = MetricsLog.write

    def stop_in_validation(log, step, split, values):
        write(log, step, split, values)
        if (step, split) == (12, "valid"):
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_in_evaluation(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal is lost")

    for target, name, stop in (
        (MetricsLog, "write", stop_in_validation),
        (evaluation, "evaluate_on", stop_in_evaluation),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, stop)
            assert cli.main(train_arguments(tmp_path)) == 143
        told = capsys.readouterr().err
        assert "stopped by SIGTERM" in told and "same command" in told
        assert (tmp_path / "checkpoints" / "12").is_dir()
        assert not (tmp_path / "result.json").exists()
        assert not (tmp_path / "train.lock").exists()
    assert cli.main(train_arguments(tmp_path)) == 0
    assert figures(tmp_path) == figures(lm_run)
    assert result(tmp_path) == result(lm_run)


@pytest.mark.parametrize("when", ["while_read", "while_training"])
def test_files_that_change_while_a_run_uses_them_are_noticed(
    train_arguments, tiny_fasta, tmp_path, monkeypatch, capsys, when
):
    valid, folder = tmp_path / "valid.fasta", tmp_path / "run"
    shutil.copy(tiny_fasta, valid)
    arguments = [*train_arguments(folder), f"--test_fasta={valid}"]
    write, load = MetricsLog.write, train.load_training_data

    def change(*_):
        valid.write_text(">a\nMKTAYIAKQR\n")

    def write_and_change(log, step, split, values):
        write(log, step, split, values)
        change()

    def load_and_change(*given, **options):
        found = load(*given, **options)
        change()
        return found

    with monkeypatch.context() as patch:
        if when == "while_read":
            patch.setattr(train, "load_training_data", load_and_change)
        else:
            patch.setattr(MetricsLog, "write", write_and_change)
        assert cli.main(arguments) == 1
    told = capsys.readouterr().err
    assert f"test: {valid} had" in told and "restore the files" in told
    assert not (folder / "result.json").exists()
    assert folder.exists() == (when == "while_training")
    shutil.copy(tiny_fasta, valid)
    if when == "while_training":
        assert cli.main(arguments) == 0
        assert json.loads((folder / "result.json").read_text())["steps"] == 12


def test_a_folder_whose_name_is_no_utf_8_is_refused_before_any_work(
    train_arguments, tmp_path, capsys
):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    assert cli.main(train_arguments(Path(name))) == 1
    assert "is not UTF-8" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_records_are_skipped_alike_by_calibration_and_with_another_batch_size(
    train_arguments, tiny_fasta, other_fasta, tmp_path
):
    """A resumed run has the batches that it began with."""
    with other_fasta.open("a") as file:
        file.write(">bad\nMK7\n")
    settings = [
        "make_fast_softmax_attention.estimator = 'wderf_s'",
        "make_fast_softmax_attention.unidirectional = True",
        "make_fast_softmax_attention.calibration = 'stored'",
        "experiment.calibration_batches = 2",
        "experiment.max_train_steps = 8",
        "experiment.num_samples = 0",
    ]
    given = [
        argument.replace(tiny_fasta, str(other_fasta))
        for argument in [*train_arguments(tmp_path / "whole", *settings), "--on_error=skip"]
    ]
    assert cli.main(given) == 0
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed"))
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "8")
    config = (run / "config.gin").read_text()
    rows = "experiment.batch_size_per_device = "
    (run / "config.gin").write_text(config.replace(f"{rows}4", f"{rows}2"))
    (run / "model.json").write_text("[]")
    given = [argument.replace("whole", "resumed") for argument in given]
    assert cli.main([*given, "--batch_size=2"]) == 0
    assert figures(run) == figures(tmp_path / "whole")
    assert "bad" in (run / "skipped_train.tsv").read_text()
    # The settings make the model, and its description is written anew.
    assert json.loads((run / "model.json").read_text())["training"]["batch_size_per_device"] == 2


def test_without_other_files_a_part_is_held_out(train_arguments, other_fasta, tmp_path, capsys):
    def arguments(folder, *settings):
        given = train_arguments(tmp_path / folder, "experiment.num_samples = 0", *settings)
        kept = [argument for argument in given if "fasta=" not in argument]
        return [*kept, f"--fasta={other_fasta}", "--steps=2"]

    assert cli.main(arguments("run")) == 0
    told = capsys.readouterr()
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    held = [entry.sequence for entry in read_fasta(tmp_path / "run" / "held_out.fasta")]
    everything = [entry.sequence for entry in read_fasta(other_fasta)]
    assert f"{len(held)} of 300 proteins are held out" in told.err and "--valid_fasta" in told.err
    assert "perplexity" in told.out
    assert record["proteins"] == {"train": 300 - len(held), "valid": len(held)}
    assert 0 < len(held) < 40 and set(held) < set(everything)
    assert result(tmp_path / "run")["evaluation"]["proteins"] == len(held)

    impatient = ("experiment.valid_fraction = 0.0", "experiment.early_stopping = 2")
    assert cli.main(arguments("other", *impatient)) == 1
    assert "early_stopping is 2, but the run has no validation proteins" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_shared_proteins_are_counted(finished, lm_run):
    record = json.loads((lm_run / "data.json").read_text())
    assert record["identical_to_training"] == {"valid": record["proteins"]["valid"]}


def test_the_folder_of_an_export_is_refused(train_arguments, tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    assert cli.main(train_arguments(tmp_path)) == 1
    assert "exported model" in capsys.readouterr().err
    (tmp_path / "model.safetensors").rename(tmp_path / "result.json")
    assert cli.main(train_arguments(tmp_path)) == 1
    assert "the result of something else" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00 = 3\n", bytes(2**24 + 1)])
def test_settings_that_are_no_text_are_named(content, tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_bytes(content)
    with pytest.raises(RunError, match=r"config\.gin (is damaged|has 16,777,217 bytes)"):
        resuming.open_folder(folder, "")
