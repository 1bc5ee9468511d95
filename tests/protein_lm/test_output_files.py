import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_attention.protein_lm import cli, output_files
from fast_attention.protein_lm.fasta import FastaRecord, write_fasta
from fast_attention.protein_lm.output_files import OutputError, check_output, printable, replacing
from fast_attention.protein_lm.run_folder import write_file

RECORD = FastaRecord("a", "", "MKTAY" * 1000)
WRITERS = {
    "file": lambda path: write_file(Path(path), "MKTAY" * 1000),
    "fasta": lambda path: write_fasta(path, [RECORD]),
    "check": check_output,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_where_nothing_can_be_written_is_told_and_nothing_is_left(tmp_path, writer):
    write = WRITERS[writer]
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"x/a\.fasta cannot be written: its folder does not"):
        write(tmp_path / "x" / "a.fasta")
    with pytest.raises(OutputError, match=r"file/a\.fasta cannot be written: its folder is a file"):
        write(tmp_path / "file" / "a.fasta")
    with pytest.raises(OutputError, match="folder cannot be written: there is a folder"):
        write(tmp_path / "folder")
    if writer != "check":
        with pytest.raises(OutputError, match="cannot be written"):
            write(Path("/proc/a.fasta"))
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_folder_without_permission_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="permission denied: write elsewhere"):
        check_output(tmp_path / "a")


@pytest.mark.parametrize("name", ["a.fasta", "a.fasta.gz"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, name, number):
    path = tmp_path / name
    write_fasta(path, [FastaRecord("old", "", "MK")])
    before = path.read_bytes()

    def replace(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output_files.os, "replace", replace)
    with pytest.raises(OutputError, match=rf"{name} cannot be written: .+"):
        write_fasta(path, [RECORD])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


FULL = """
import resource, sys
from pathlib import Path
from fast_attention.protein_lm.fasta import FastaRecord, write_fasta
from fast_attention.protein_lm.output_files import OutputError
from fast_attention.protein_lm.run_folder import write_file
from fast_attention.protein_lm.skipped_records import SkippedRecord, list_skipped

def list_many(path):
    with list_skipped(path) as skipped:
        for number in range(10_000):
            skipped.add(SkippedRecord("a.fasta", number, "a", "is bad"))

letters = "ACDEFGHIKLMNPQRSTVWY"
records = [FastaRecord(str(i), "", "".join(letters[i * k % 19] for k in range(99))) for i in
           range(2000)]
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
for name, write in {
    "a.fasta": lambda path: write_fasta(path, records),
    "a.fasta.gz": lambda path: write_fasta(path, records),
    "a.json": lambda path: write_file(Path(path), "x" * 10_000),
    "a.tsv": list_many,
}.items():
    try:
        write(sys.argv[1] + "/" + name)
    except OutputError as error:
        print(error)
"""


def test_a_file_that_does_not_fit_is_told_and_not_left_in_part(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ["a.fasta", "a.fasta.gz", "a.json", "a.tsv"], strict=True):
        assert line.startswith(f"{tmp_path}/{name} cannot be written: the file is larger")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_other_files_are_not_taken_for_errors_of_this(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "a"):
        (tmp_path / "other").read_text()
    with pytest.raises(BrokenPipeError), replacing(tmp_path / "a"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert list(tmp_path.iterdir()) == []


def test_fields_of_tables_hold_no_tabs_and_no_line_ends():
    assert printable("=cmd() /a b") == "=cmd() /a b"
    assert printable("a\tb\nc\x1b\udcff") == r"a\tb\nc\x1b\udcff"


@pytest.mark.parametrize("place", ["absent/out", "", "file/out"])
def test_commands_tell_it_before_they_begin(lm_run, tiny_fasta, tmp_path, place, capsys):
    (tmp_path / "file").write_text("before")
    output = f"--output={tmp_path / place}"
    for arguments in (
        ["evaluate", f"--run_dir={lm_run}", f"--fasta={tiny_fasta}", output],
        ["sample", f"--run_dir={lm_run}", output],
    ):
        assert cli.main(arguments) == 1
        told = capsys.readouterr().err
        assert f"{tmp_path / place} cannot be written" in told and "Traceback" not in told
    assert (tmp_path / "file").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1
