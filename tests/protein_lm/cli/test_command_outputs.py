"""What holds for the outputs of every command."""

import io
import json
import os
import signal

import numpy as np
import pytest

from fast_attention.protein_lm import FastaRecord, cli, read_fasta, write_fasta

COMMANDS = {
    "score": ("--output", ".tsv"),
    "mutate": ("--output", ".tsv"),
    "embed": ("--output", ".npz"),
    "sample": ("--output", ".fasta"),
    "evaluate": ("--output", ".json"),
    "predict": ("--output", ".tsv"),
    "diagnose": ("--output", ".json"),
}


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    path = tmp_path_factory.mktemp("proteins") / "a.fasta"
    write_fasta(path, [FastaRecord("a", "", "MKTAYIAKQR"), FastaRecord("b", "", "ACDEFGHIK")])
    return path


@pytest.fixture(scope="module")
def predictor(lm_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    rows = [f"0{row},MK{'AW'[row % 2] * (row + 1)},{row}" for row in range(12)]
    (folder / "t.csv").write_text("\n".join(["id,sequence,label", *rows, ""]))
    output = folder / "fine_tuned"
    arguments = ["fine-tune", f"--run_dir={lm_run}", f"--table={folder / 't.csv'}"]
    assert cli.main([*arguments, "--task=regression", f"--output={output}"]) == 0
    assert sorted(os.listdir(folder)) == ["fine_tuned", "t.csv"]
    return output


@pytest.fixture
def arguments(lm_run, predictor, proteins):
    run, fasta = f"--run_dir={lm_run}", f"--fasta={proteins}"
    return {
        "score": ["score", run, fasta],
        "mutate": ["mutate", run, fasta, "--all", "--positions=2"],
        "embed": ["embed", run, fasta],
        "sample": ["sample", run, "--num_samples=2", "--max_length=9"],
        "evaluate": ["evaluate", run, fasta],
        "predict": ["predict", f"--model={predictor}", fasta],
        "diagnose": ["diagnose", run, fasta],
    }


def check(command: str, content: bytes) -> None:
    """Checks that bytes are a whole output of a command."""
    if command == "embed":
        assert np.load(io.BytesIO(content))["ids"].tolist() == ["a", "b"]
    elif COMMANDS[command][1] == ".json":
        json.loads(content)
    else:
        assert content.startswith(b">" if command == "sample" else b"id\t")
        assert content.endswith(b"\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_stays_and_its_target_is_written(arguments, tmp_path, command, capfd):
    option, extension = COMMANDS[command]
    (tmp_path / "far").mkdir()
    link, target = tmp_path / f"link{extension}", tmp_path / "far" / "target"
    link.symlink_to(target)
    assert cli.main([*arguments[command], f"{option}={link}"]) == 0
    assert str(link) in capfd.readouterr().out
    assert link.is_symlink()
    check(command, target.read_bytes())
    assert os.listdir(tmp_path / "far") == ["target"]


@pytest.mark.parametrize("command", COMMANDS)
def test_standard_output_has_the_output_alone(arguments, command, capfdbinary):
    assert cli.main([*arguments[command], f"{COMMANDS[command][0]}=-"]) == 0
    found = capfdbinary.readouterr()
    check(command, found.out)
    assert b"protein" in found.err


@pytest.mark.parametrize("command", ["score", "mutate", "predict"])
@pytest.mark.parametrize("content", [None, "", "MKT\n", ">a\nM1T\n"])
def test_standard_output_stays_empty_where_the_input_is_wrong(
    arguments, proteins, tmp_path, command, content, capfd
):
    wrong = tmp_path / "wrong.fasta"
    if content is not None:
        wrong.write_text(content)
    given = [x.replace(str(proteins), str(wrong)) for x in arguments[command]]
    assert cli.main(given) == 1
    found = capfd.readouterr()
    assert found.out == "" and str(wrong) in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_device_is_told_in_one_line(arguments, tmp_path, command, capfd):
    assert cli.main([*arguments[command], f"{COMMANDS[command][0]}=/dev/full"]) == 1
    told = capfd.readouterr().err
    assert "/dev/full cannot be written: the disk is full" in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_inputs_are_no_outputs_whatever_their_names(
    arguments, lm_run, predictor, proteins, tmp_path, command, capfd
):
    option, extension = COMMANDS[command]
    parameters = predictor / "head.npz" if command == "predict" else lm_run / "config.gin"
    sources = [parameters] if command == "sample" else [parameters, proteins]
    for number, source in enumerate(sources):
        before = source.read_bytes()
        for name in (f"symbolic{number}{extension}", f"hard{number}{extension}"):
            path = tmp_path / name
            path.symlink_to(source) if "symbolic" in name else path.hardlink_to(source)
            assert cli.main([*arguments[command], f"{option}={path}"]) == 1
            assert f"{option} {path} is the same file as the input" in capfd.readouterr().err
        assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("score", ["--output={}.tsv", "--skipped_list={}.tsv"]),
        ("mutate", ["--output={}.tsv", "--heatmap={}.tsv"]),
        ("embed", ["--output={}.npz", "--skipped_list={}.npz"]),
        ("evaluate", ["--output={}.tsv", "--per_protein={}.tsv"]),
        ("evaluate", ["--output=-", "--skipped_list=/dev/stdout"]),
        ("predict", ["--output={}.tsv", "--skipped_list={}.tsv"]),
        ("diagnose", ["--output={}.tsv", "--plot={}.tsv"]),
    ],
    ids=["score", "mutate", "embed", "evaluate", "stdout", "predict", "diagnose"],
)
def test_two_outputs_of_one_name_are_refused(arguments, tmp_path, command, options, capfd):
    given = [option.format(tmp_path / "same") for option in options]
    assert cli.main([*arguments[command], *given]) == 1
    assert "name the same file" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("score", ["--output={}.tsv", "--skipped_list={}.txt"], ".tsv, .csv"),
        ("embed", ["--output={}.npz", "--skipped_list={}.json"], ".tsv, .csv"),
        ("predict", ["--output={}.tsv", "--skipped_list={}"], ".tsv, .csv"),
        ("evaluate", ["--output={}.json", "--per_protein={}.xlsx"], ".tsv, .csv"),
        ("mutate", ["--output={}.tsv", "--heatmap={}.pdf"], ".png"),
        ("diagnose", ["--output={}.tsv", "--plot={}.svg"], ".png"),
    ],
    ids=["score", "embed", "predict", "evaluate", "mutate", "diagnose"],
)
def test_a_name_that_says_another_format_is_refused(
    arguments, tmp_path, command, options, expected, capfd
):
    given = [option.format(tmp_path / "some") for option in options]
    assert cli.main([*arguments[command], *given]) == 1
    told = capfd.readouterr().err
    assert given[1].partition("=")[2] in told and f"must be one of {expected}" in told
    assert not list(tmp_path.iterdir())


def test_the_evaluation_in_the_folder_of_a_run_is_an_output(arguments, lm_run, tmp_path, capfd):
    target = tmp_path / "each.tsv"
    target.symlink_to(lm_run / "evaluation.json")
    assert cli.main([*arguments["evaluate"], f"--per_protein={target}"]) == 1
    assert "evaluation.json and --per_protein name the same file" in capfd.readouterr().err


def test_an_export_that_fails_leaves_what_was_there(lm_run, tmp_path, monkeypatch, capfd):
    target = tmp_path / "new" / "export"

    def interrupt(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    arguments = ["export", f"--run_dir={lm_run}", f"--output={target}"]
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", interrupt)
        assert cli.main(arguments) == 143
    assert "stopped by SIGTERM" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    umask = os.umask(0o022)
    assert cli.main(arguments) == 0
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", interrupt)
        assert cli.main(arguments) == 143
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_the_table_of_a_fine_tuning_is_not_overwritten(lm_run, predictor, tmp_path, capfd):
    (tmp_path / "predictions.tsv").write_text("id\tsequence\tlabel\na\tMK\t1\n")
    arguments = ["fine-tune", f"--run_dir={lm_run}", f"--output={tmp_path}", "--task=regression"]
    assert cli.main([*arguments, f"--table={tmp_path / 'predictions.tsv'}"]) == 1
    assert "predictions.tsv would be overwritten" in capfd.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_samples_may_replace_a_file_that_is_not_read(arguments, tmp_path):
    path = tmp_path / "old.fasta"
    path.write_text("old")
    assert cli.main([*arguments["sample"], f"--output={path}"]) == 0
    assert len(list(read_fasta(path))) == 2
