import json
import shutil
import subprocess
import sys
from pathlib import Path

import gin
import pytest

from fast_attention.protein_lm import cli, gin_registry, read_fasta, write_fasta
from fast_attention.protein_lm.cli.train import read_weights
from fast_attention.protein_lm.training import train


def test_a_run_is_evaluated(lm_run, tiny_fasta, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["evaluate", f"--run_dir={lm_run}", f"--fasta={tiny_fasta}", f"--output={figures}"]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "perplexity" in told and str(figures) in told
    assert json.loads(figures.read_text())["step"] == 12


def test_a_fresh_process_samples(lm_run, tmp_path):
    samples = tmp_path / "new.fasta"
    arguments = [
        "sample",
        f"--run_dir={lm_run}",
        "--num_samples=4",
        "--prompt=MK",
        "--temperature=0.8",
        "--top_k=12",
        "--top_p=0.9",
        "--max_length=30",
        "--seed=3",
        f"--output={samples}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fast_attention.protein_lm", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    records = list(read_fasta(samples))
    assert len(records) == 4
    assert all(record.sequence.startswith("MK") for record in records)


def test_evaluate_writes_beside_the_run_unless_told_otherwise(lm_run, tiny_fasta, capsys):
    assert cli.main(["evaluate", f"--run_dir={lm_run}", f"--fasta={tiny_fasta}"]) == 0
    output = lm_run / "evaluation.json"
    assert str(output) in capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert figures["run_dir"] == str(lm_run)
    assert {"perplexity", "accuracy", "name"} < set(figures["scores"][0])
    output.unlink()


def test_evaluate_tells_of_hidden_residues(bert_run, tiny_fasta, tmp_path, capsys):
    arguments = ["evaluate", f"--run_dir={bert_run}", f"--fasta={tiny_fasta}", "--seed=4"]
    assert cli.main([*arguments, f"--output={tmp_path / 'figures.json'}"]) == 0
    assert "hidden residues" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["seed"] == 4


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["sample"], ["score"], ["embed"]])
def test_help_says_what_is_what(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "protein" in told
    if command:
        assert "_dir" in told and "FASTA" in told


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["train", "--work_dir=x", "--gin=y"], ["embed", "--run_dir=x"]],
)
def test_arguments_that_cannot_be_understood_give_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.fixture
def damaged(tmp_path):
    path = tmp_path / "damaged.fasta"
    path.write_text(">a\nMKT\n>b\nMK7\n")
    return path


def fails(arguments: list[str], capsys) -> str:
    assert cli.main(arguments) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    *notes, error = told.splitlines()
    assert error.startswith(f"protein-lm {arguments[0]}: error: ")
    assert all(note.startswith("note: ") for note in notes)
    return told


def test_a_missing_gin_file_is_named(tmp_path, capsys):
    told = fails(
        ["train", f"--gin_file={tmp_path}/absent.gin", f"--work_dir={tmp_path}/run"], capsys
    )
    assert "absent.gin" in told


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("FlaxModel.num_head = 2", "did you mean 'num_heads'"),
        ("experiment.max_train_step = 2", "max_train_step"),
        ("FlaxModel.num_layers == 2", ""),
        ("create_learning_rate_scheduler.factors = 'constnat'", "constnat"),
        ("experiment.max_train_steps = 0", "a whole number from 1 to"),
        ("experiment.max_train_length = 65", "make_protein_domain.length"),
        ("FlaxModel.num_layers = 0", "num_layers"),
    ],
)
def test_a_bad_setting_is_told(train_arguments, tmp_path, binding, expected, capsys):
    assert expected in fails(train_arguments(tmp_path / "run", binding), capsys)
    assert not (tmp_path / "run").exists()


def test_a_bad_fasta_file_is_named_with_its_line(
    train_arguments, lm_run, damaged, tmp_path, capsys
):
    for arguments in (
        ["evaluate", f"--run_dir={lm_run}", f"--fasta={damaged}"],
        ["train", f"--work_dir={tmp_path / 'run'}", f"--fasta={damaged}"],
    ):
        told = fails(arguments, capsys)
        assert str(damaged) in told and "line 4" in told
    assert "absent" in fails(
        ["evaluate", f"--run_dir={lm_run}", f"--fasta={tmp_path}/absent.fasta"], capsys
    )


def test_a_folder_without_a_run_is_told(tmp_path, tiny_fasta, capsys):
    told = fails(["evaluate", f"--run_dir={tmp_path}", f"--fasta={tiny_fasta}"], capsys)
    assert "not the folder of a run" in told
    (tmp_path / "file").write_text("")
    told = fails(["train", f"--work_dir={tmp_path / 'file'}", f"--fasta={tiny_fasta}"], capsys)
    assert "not a folder" in told


def test_a_checkpoint_of_another_shape_is_told(lm_run, tmp_path, tiny_fasta, capsys):
    for name in ("model.json", "baselines.npz"):
        (tmp_path / name).write_bytes((lm_run / name).read_bytes())
    arguments = ["evaluate", f"--run_dir={tmp_path}", f"--fasta={tiny_fasta}"]
    assert "not reached its first" in fails(arguments, capsys)
    shutil.copytree(lm_run / "checkpoints", tmp_path / "checkpoints")
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"mlp_dim": 64', '"mlp_dim": 32'))
    assert "does not fit" in fails(arguments, capsys)


def test_samples_of_a_masked_model_are_refused(bert_run, tmp_path, capsys):
    output = tmp_path / "new.fasta"
    told = fails(["sample", f"--run_dir={bert_run}", f"--output={output}"], capsys)
    assert "FlaxLM" in told and not output.exists()


def test_samples_that_cannot_be_drawn_leave_the_old_file(lm_run, tiny_fasta, tmp_path, capsys):
    output = tmp_path / "new.fasta"
    write_fasta(output, [next(iter(read_fasta(tiny_fasta)))])
    before = output.read_bytes()
    told = fails(["sample", f"--run_dir={lm_run}", "--prompt=MKJ", f"--output={output}"], capsys)
    assert "'J'" in told
    assert output.read_bytes() == before


def test_a_traceback_is_shown_on_request(tmp_path, capsys):
    arguments = ["sample", f"--run_dir={tmp_path}", f"--output={tmp_path}/x", "--traceback"]
    assert cli.main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err


def test_files_are_told_from_weights(tmp_path):
    odd = tmp_path / "odd=3"
    odd.touch()
    assert read_weights(["a.fasta", str(odd), "b=c"]) == ["a.fasta", str(odd), "b=c"]
    assert read_weights(["a=2", "b", f"{odd}=0.5"]) == {"a": 2.0, "b": 1.0, str(odd): 0.5}
    with pytest.raises(ValueError, match="once"):
        read_weights(["a=2", "a"])


def test_without_a_gin_file_the_settings_are_those_of_the_demo(
    tiny_fasta, tmp_path, monkeypatch, capsys
):
    settings = []
    monkeypatch.setattr(train, "run_experiment", lambda *_, **__: settings.append(gin.config_str()))
    given = [f"--fasta={tiny_fasta}", f"--work_dir={tmp_path / 'run'}"]
    assert cli.main(["train", *given]) == 0
    assert (
        f"no --gin_file: the settings are those of {gin_registry.DEMO}" in capsys.readouterr().err
    )
    assert cli.main(["train", *given, f"--gin_file={gin_registry.DEMO}"]) == 0
    assert "no --gin_file" not in capsys.readouterr().err
    assert settings[0] == settings[1] and "FlaxModel.num_layers" in settings[0]
    gin.clear_config()
