import errno
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.data.fasta import FastaRecord, write_fasta
from fast_attention.protein_lm.files import output_files
from fast_attention.protein_lm.files.output_files import (
    check_output,
    check_outputs,
    json_text,
    open_output,
    open_output_folder,
    printable,
    write_file,
)
from fast_attention.protein_lm.files.output_targets import OutputError

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
    with pytest.raises(OutputError, match="folder cannot be written: it is a folder"):
        write(tmp_path / "folder")
    if writer != "check":
        with pytest.raises(OutputError, match="cannot be written"):
            write(Path("/proc/a.fasta"))
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]


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
from fast_attention.protein_lm.data.fasta import FastaRecord, write_fasta
from fast_attention.protein_lm.files.output_files import write_file
from fast_attention.protein_lm.files.output_targets import OutputError
from fast_attention.protein_lm.data.skipped_records import SkippedRecord, list_skipped

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
        cwd=Path(__file__).parents[3],
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ["a.fasta", "a.fasta.gz", "a.json", "a.tsv"], strict=True):
        assert line.startswith(
            f"{tmp_path}/{name} cannot be written: the file exceeds the size limit"
        )
    assert list(tmp_path.iterdir()) == []


def test_errors_of_other_files_are_not_taken_for_errors_of_this(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), open_output(tmp_path / "a"):
        (tmp_path / "other").read_text()
    with pytest.raises(BrokenPipeError), open_output(tmp_path / "a"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seekable", [False, True], ids=["stream", "seekable"])
class TestTargets:
    def test_links_are_followed_and_stay_links(self, tmp_path, seekable):
        (tmp_path / "far").mkdir()
        link, target = tmp_path / "link", tmp_path / "far" / "file"
        link.symlink_to("middle")
        (tmp_path / "middle").symlink_to(target)
        for content in (b"one", b"two"):
            with open_output(link, seekable=seekable) as file:
                file.write(content)
                # The temporary file is on the file system of the target.
                assert Path(file.name).parent == target.parent
            assert link.is_symlink() and target.read_bytes() == content
        assert sorted(entry.name for entry in tmp_path.rglob("*")) == [
            "far",
            "file",
            "link",
            "middle",
        ]

    def test_a_named_pipe_stays_a_pipe(self, tmp_path, seekable):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with open_output(pipe, seekable=seekable) as file:
            file.write(b"content")
        assert os.read(reader, 100) == b"content"
        os.close(reader)
        assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]

    def test_a_descriptor_is_written_behind_what_is_there(self, tmp_path, seekable):
        with (tmp_path / "file").open("wb", buffering=0) as stream:
            stream.write(b"before ")
            with open_output(f"/dev/fd/{stream.fileno()}", seekable=seekable) as file:
                file.write(b"content")
        assert (tmp_path / "file").read_bytes() == b"before content"

    @pytest.mark.parametrize("name", ["-", "/dev/stdout", "/proc/self/fd/1"])
    def test_standard_output_has_several_names(self, capfdbinary, seekable, name):
        print("before")
        with open_output(name, seekable=seekable) as file:
            file.write(b"content")
        assert capfdbinary.readouterr().out == b"before\ncontent"

    def test_a_device_that_is_full_is_an_error(self, seekable):
        with (
            pytest.raises(OutputError, match="/dev/full cannot be written: the disk is full"),
            open_output("/dev/full", seekable=seekable) as file,
        ):
            file.write(b"content")

    def test_a_device_stays_a_device(self, seekable):
        with open_output(os.devnull, seekable=seekable) as file:
            file.write(b"content")
        assert Path(os.devnull).is_char_device()

    def test_a_library_may_replace_the_temporary_file(self, tmp_path, seekable):
        path = tmp_path / "file"
        with open_output(path, seekable=seekable) as file:
            other = tmp_path / "other"
            other.write_bytes(b"content")
            other.chmod(0o600)
            other.replace(file.name)
        assert path.read_bytes() == b"content"
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_of_the_umask_or_of_the_replaced_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "new", "content")
        (tmp_path / "old").write_text("old")
        (tmp_path / "old").chmod(0o640)
        write_file(tmp_path / "old", "content")
        with open_output_folder(tmp_path / "folder", last="b") as folder:
            write_file(folder / "b", "content")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {
        "new": 0o666 & ~umask,
        "old": 0o640,
        "folder": 0o777 & ~umask,
        "b": 0o666 & ~umask,
    }


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path):
    path = tmp_path / ("x" * 255)
    write_file(path, "content")
    assert path.read_text() == "content"
    with pytest.raises(OutputError, match="the name is too long"):
        check_output(tmp_path / ("x" * 256))


def test_no_two_outputs_and_no_input_share_a_file(tmp_path):
    names = {name: tmp_path / name for name in ("a", "b", "symbolic", "hard", "new", "to_new")}
    for name in ("a", "b"):
        names[name].write_text(name)
    names["symbolic"].symlink_to("a")
    names["hard"].hardlink_to(names["a"])
    names["to_new"].symlink_to("new")
    check_outputs({"--output": names["a"], "--plot": names["b"], "--list": None}, [names["new"]])
    for one, other in (("a", "a"), ("a", "symbolic"), ("a", "hard"), ("new", "to_new")):
        message = f"--output and --plot name the same file, .*{other}: give each output"
        with pytest.raises(OutputError, match=message):
            check_outputs({"--output": names[one], "--plot": names[other]})
        if one != "new":
            with pytest.raises(
                OutputError, match="--output .* is the same file as the input .*a, "
            ):
                check_outputs({"--output": names[other]}, [names["b"], names["a"]])
    with pytest.raises(OutputError, match="name the same file"):
        check_outputs({"--output": "-", "--plot": "/dev/stdout"})
    check_outputs({"--output": os.devnull, "--plot": os.devnull}, [os.devnull])


class TestFolder:
    def test_it_appears_when_it_is_complete(self, tmp_path):
        target = tmp_path / "new" / "folder"
        with open_output_folder(target, last="a") as folder:
            (folder / "a").write_text("1")
            assert not target.exists()
        assert [path.name for path in target.iterdir()] == ["a"]
        (target / "own").write_text("of the user")
        with open_output_folder(target, last="a") as folder:
            for name in ("a", "b"):
                (folder / name).write_text("2")
        found = {path.name: path.read_text() for path in target.iterdir()}
        assert found == {"a": "2", "b": "2", "own": "of the user"}
        assert [path.name for path in target.parent.iterdir()] == ["folder"]

    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr
    )
    def test_nothing_is_left_of_one_that_failed(self, tmp_path, error):
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "a").write_text("old")
        for name in ("new/folder", "old"):
            with (
                pytest.raises(type(error)),
                open_output_folder(tmp_path / name, last="a") as folder,
            ):
                (folder / "a").write_text("content")
                raise error
        assert [path.name for path in tmp_path.rglob("*")] == ["old", "a"]
        assert (tmp_path / "old" / "a").read_text() == "old"

    def test_standard_output_is_no_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with (
            pytest.raises(OutputError, match="standard output, but a folder is written"),
            open_output_folder("-", last="a"),
        ):
            pass
        assert not list(tmp_path.iterdir())

    def test_errors_name_the_folder_that_was_asked_for(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="file is not a folder"):
            check_folder(tmp_path / "file")
        with pytest.raises(OutputError, match="x cannot be written: its folder is a file"):
            check_folder(tmp_path / "file" / "x")
        with (
            pytest.raises(OutputError, match=f"^{tmp_path}/new/{'x' * 300} cannot .* too long"),
            open_output_folder(tmp_path / "new", last="a") as folder,
        ):
            write_file(folder / ("x" * 300), "")


def check_folder(path: Path) -> None:
    with open_output_folder(path, last="a"):
        pass


def test_json_has_null_for_what_it_cannot_write():
    value = {"a": [math.nan, -math.inf, 1e-300], "b": (0.1, None)}
    assert json.loads(json_text(value)) == {"a": [None, None, 1e-300], "b": [0.1, None]}


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
