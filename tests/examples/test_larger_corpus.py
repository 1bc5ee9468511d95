import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples import larger_corpus
from fast_attention.protein_lm.data.fasta import FastaRecord, read_fasta, write_fasta

PROTEINS = {"P1|GO:1": "MKT" * 10, "P2|GO:1,GO:2": "ACD" * 10, "P3|GO:1": "WWY" * 10, "P4|": "MAC"}


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# Finds P2 from whatever it is asked, and lets P1 and a protein of the package stand for clusters.
MMSEQS = """
case "$1" in
easy-search) test -s "$2" && test -s "$3" && echo P2 > "$4";;
easy-linclust) printf ">P1\\nMKT\\n>package-7\\nMKT\\n" > "$3_rep_seq.fasta"; cp "$2" "$SEEN";;
esac
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on three databases, with programs that stand for BLAST and MMseqs2."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    text = "".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items())
    (tmp_path / "all.fasta").write_text(text)
    program(bin_folder, "blastdbcmd", f"cat {tmp_path / 'all.fasta'}")
    program(bin_folder, "mmseqs", MMSEQS)
    monkeypatch.setenv("SEEN", str(tmp_path / "clustered.fasta"))
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    for part in ("BPO", "MFO", "CCO"):
        database = tmp_path / "unpacked" / "dataset_201401" / part / "goasp.fasta.psq"
        database.parent.mkdir(parents=True)
        database.touch()
    evaluation = tmp_path / "evaluation.fasta"
    write_fasta(evaluation, [FastaRecord("E1", "", "ACD" * 10)])

    def run(*options):
        larger_corpus.main(
            [f"--databases={tmp_path / 'unpacked'}", f"--evaluation={evaluation}", *options]
        )

    return run


@pytest.mark.parametrize(
    ("options", "kept"),
    [((), ["P1", "P3"]), (("--identity=0.3",), ["P1"])],
    ids=["all", "clusters"],
)
def test_relatives_short_ones_repeats_and_all_but_one_of_a_cluster_are_left_out(
    options, kept, run, tmp_path, capsys
):
    output = tmp_path / "corpus.fasta.gz"
    run(f"--output={output}", *options)
    assert [record.id for record in read_fasta(output)] == kept
    assert f"{len(kept)} proteins, {30 * len(kept)} residues" in capsys.readouterr().out
    if options:
        clustered = [record.id for record in read_fasta(tmp_path / "clustered.fasta")]
        assert clustered[:3] == ["P1", "P3", "package-0"]


def test_a_signal_leaves_no_temporary_files(run, tmp_path):
    """In a process of its own, which ends by the signal where nothing handles it."""
    program(tmp_path / "bin", "blastdbcmd", "kill -TERM $PPID; exec sleep 60")
    (tmp_path / "temporary").mkdir()
    arguments = [f"--databases={tmp_path / 'unpacked'}", f"--output={tmp_path / 'corpus.fasta'}"]
    done = subprocess.run(
        [sys.executable, "-m", "examples.larger_corpus", *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "corpus.fasta").exists()


def test_a_share_of_the_proteins_is_a_function_of_their_residues():
    shares = [larger_corpus._share(f"MKT{number}") for number in range(400)]
    assert 0.4 < sum(share < 0.5 for share in shares) / 400 < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output=nowhere/corpus.fasta",), "its folder does not exist"),
        (("--output=evaluation.fasta",), "is the same file as the input"),
        (("--output=old.fasta", "--evaluation=none.fasta"), "none.fasta: no such file"),
        (("--output=old.fasta", "--databases=nowhere"), "unpack metastudent-data there"),
        (("--output=old.fasta", "--share=nan"), "--share must be above 0"),
        (("--output=old.fasta", "--share=1.5"), "--share must be above 0"),
    ],
)
def test_what_cannot_work_is_told_before_the_search(
    options, message, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "evaluation.fasta").read_text()
    program(tmp_path / "bin", "blastdbcmd", "exit 9")
    with pytest.raises(SystemExit):
        run(*options)
    assert message in capsys.readouterr().err
    assert (tmp_path / "evaluation.fasta").read_text() == before


@pytest.mark.parametrize(
    ("options", "programs", "message"),
    [
        (("--share=1e-9",), {}, "no protein is left"),
        (("--share=1e-9", "--identity=0.3"), {}, "no protein is left"),
        ((), {"mmseqs": "exit 9"}, "exit status 9"),
    ],
)
def test_a_failure_leaves_the_output_as_it_was(options, programs, message, run, tmp_path, capsys):
    output = tmp_path / "old.fasta"
    output.write_text("mine")
    for name, script in programs.items():
        program(tmp_path / "bin", name, script)
    with pytest.raises(SystemExit):
        run(f"--output={output}", *options)
    assert message in capsys.readouterr().err
    assert output.read_text() == "mine"
