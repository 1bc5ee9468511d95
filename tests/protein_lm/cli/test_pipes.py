"""What other programs of a shell expect of a command: pipes, status, one line a message."""

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


def test_what_reads_twice_asks_for_a_file(lm_run, standard_input, capsys):
    standard_input(FASTA)
    assert cli.main(["evaluate", f"--run_dir={lm_run}", "--fasta=-"]) == 1
    assert "to a file first" in capsys.readouterr().err


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

{"signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignored else ""}
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
