"""What other programs of a shell expect of a command: pipes, status, one line a message."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fast_attention.protein_lm import cli

ROOT = Path(__file__).parents[3]
FASTA = ">p\nMKTAYIAKQR\n>q\nACDEFGHIK\n"


@pytest.fixture
def standard_input():
    """Gives a function that puts text where the next command reads its standard input."""
    before = os.dup(0)

    def put(text: str) -> None:
        end, begin = os.pipe()
        os.write(begin, text.encode())
        os.close(begin)
        os.dup2(end, 0)
        os.close(end)

    yield put
    os.dup2(before, 0)
    os.close(before)


def test_proteins_come_from_standard_input(lm_run, tmp_path, standard_input):
    path = tmp_path / "a.fasta"
    path.write_text(FASTA)
    standard_input(FASTA)
    for name, source in (("file", path), ("input", "-")):
        output = tmp_path / f"{name}.tsv"
        assert (
            cli.main(["score", f"--run_dir={lm_run}", f"--fasta={source}", f"--output={output}"])
            == 0
        )
    assert (tmp_path / "file.tsv").read_bytes() == (tmp_path / "input.tsv").read_bytes()


def test_a_file_can_be_named_like_standard_input(lm_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-").write_text(FASTA)
    assert cli.main(["score", f"--run_dir={lm_run}", "--fasta=./-", "--output=a.tsv"]) == 0
    assert Path("a.tsv").read_text().count("\n") == 3


def test_mutations_come_from_standard_input(lm_run, tmp_path, standard_input):
    standard_input("K2A\nT3del\n")
    output = tmp_path / "effects.tsv"
    wild = ["mutate", f"--run_dir={lm_run}", "--sequence=MKTAYIAKQR", f"--output={output}"]
    assert cli.main([*wild, "--mutations=-"]) == 0
    listed = output.read_bytes()
    assert cli.main([*wild, "--mutations=K2A,T3del"]) == 0
    assert output.read_bytes() == listed


def test_standard_input_is_read_once(lm_run, tmp_path, capsys):
    given = ["score", f"--run_dir={lm_run}", "--fasta=-", "--fasta=-", f"--output={tmp_path}/a.tsv"]
    assert cli.main(given) == 1
    assert "give it once" in capsys.readouterr().err


def test_an_evaluation_reads_a_pipe(lm_run, tmp_path, standard_input, capsys):
    path = tmp_path / "a.fasta"
    path.write_text(FASTA)
    results = []
    for name in (str(path), "-"):
        standard_input(FASTA)
        output = tmp_path / "a.json"
        evaluate = ["evaluate", f"--run_dir={lm_run}", f"--fasta={name}", f"--output={output}"]
        assert cli.main(evaluate) == 0
        results.append(json.loads(output.read_text()))
    file, pipe = results
    assert pipe["fasta"] == ["-"]
    assert (pipe["digest"], pipe["scores"]) == (file["digest"], file["scores"])
    assert "2 proteins (standard input;" in capsys.readouterr().out


def test_training_asks_for_a_file(train_arguments, tmp_path, standard_input, capsys):
    for option in ("--fasta", "--valid_fasta"):
        standard_input(FASTA)
        assert cli.main([*train_arguments(tmp_path / "run"), f"{option}=-"]) == 1
        assert "to a file first" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_quiet_prints_nothing_but_what_is_asked_for(lm_run, tmp_path, capsys):
    path = tmp_path / "a.fasta"
    path.write_text(FASTA)
    common = [f"--run_dir={lm_run}", "--quiet"]
    output = f"--output={tmp_path}/"
    for command in (
        ["score", f"--fasta={path}", f"{output}a.tsv"],
        ["mutate", "--sequence=MKT", "--all", f"{output}b.tsv"],
        ["sample", "--num_samples=1", "--max_length=5", f"{output}c.fasta"],
        ["export", f"{output}exported"],
    ):
        assert cli.main([*command, *common]) == 0
        assert capsys.readouterr() == ("", "")
    assert cli.main(["evaluate", f"--fasta={path}", f"{output}d.json", *common]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--min_length=9", "--max_length=3", "--output=x"],
        ["sample", "--rounds=2", "--output=x"],
        ["mutate", "--sequence=MKT", "--mutations=K2A", "--positions=1", "--output=x.tsv"],
        ["fine-tune", "--output=x"],
        ["fine-tune", "--table=a.csv", "--output=x"],
    ],
)
def test_options_that_contradict_each_other_give_status_2(
    arguments, lm_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, f"--run_dir={lm_run}"]) == 2
    assert capsys.readouterr().err.startswith(f"protein-lm {arguments[0]}: error: ")


def test_a_line_end_in_a_name_leaves_a_message_one_line(lm_run, tmp_path, capsys):
    path = tmp_path / "a\nb.fasta"
    score = ["score", f"--run_dir={lm_run}", f"--output={tmp_path}/c\nd.tsv"]
    assert cli.main([*score, f"--fasta={path}"]) == 1
    told = capsys.readouterr().err
    assert "a\\nb.fasta: no such file" in told and told.count("\n") == 1
    path.write_text(FASTA)
    assert cli.main([*score, f"--fasta={path}"]) == 0
    told = capsys.readouterr().out
    assert "c\\nd.tsv" in told and told.count("\n") == 1


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_is_obeyed_while_the_package_is_imported(ignored):
    program = f"""
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "fast_attention":
            os.kill(os.getpid(), signal.SIGINT)

# Whatever started the tests may ignore it.
signal.signal(signal.SIGINT, {"signal.SIG_IGN" if ignored else "signal.default_int_handler"})
from protein_lm_command import main
sys.meta_path.insert(0, Interrupt())
sys.argv = ["protein-lm", "--version"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if ignored:
        assert done.returncode == 0 and done.stdout.startswith("protein-lm")
    else:
        assert done.returncode == 128 + signal.SIGINT
        assert done.stderr == "protein-lm: stopped by SIGINT\n"


@pytest.mark.parametrize(
    ("closed", "output", "told"),
    [
        ("0<&-", "a.tsv", "/dev/stdin: the file is empty"),
        ("1>&-", "-", "standard output cannot be written: it is closed"),
        ("1>&-", "/dev/stdout", "/dev/stdout cannot be written: it is closed"),
        ("0<&- 1>&- 2>&-", "a.tsv", ""),
    ],
)
def test_a_closed_stream_is_no_other_file(closed, output, told, tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(FASTA)
    fasta = "-" if closed == "0<&-" else path
    score = f"{sys.executable} -m fast_attention.protein_lm score --fasta={fasta} --output={output}"
    done = subprocess.run(
        ["bash", "-c", f"exec {score} {closed}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "" and done.returncode == bool(told) and told in done.stderr
    assert (tmp_path / "a.tsv").exists() == (not told)


@pytest.mark.parametrize(("output", "resumes"), [("-", False), ("a.tsv", True)])
def test_only_what_is_kept_is_resumed(output, resumes, lm_run, monkeypatch, capsys):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS["score"], "run", stop)
    assert cli.main(["score", f"--run_dir={lm_run}", "--fasta=-", f"--output={output}"]) == 130
    assert ("the same command resumes" in capsys.readouterr().err) == resumes
