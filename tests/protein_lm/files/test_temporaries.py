import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fast_attention.protein_lm.files.output_files import (
    open_output,
    open_output_folder,
    write_file,
)
from fast_attention.protein_lm.files.temporaries import remove_stale, temporary_file

KILLED = """
import os, signal, sys
from fast_attention.protein_lm.files.output_files import open_output, open_output_folder
with open_output(sys.argv[1]) as file, open_output_folder(sys.argv[2], last="a") as folder:
    file.write(b"half")
    file.flush()
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    file, folder = tmp_path / "a.tsv", tmp_path / "folder"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(file), str(folder)],
        cwd=Path(__file__).parents[3],
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2 and all(name.startswith(".") for name in names(tmp_path))
    write_file(file, "whole")
    assert file.read_text() == "whole" and len(names(tmp_path)) == 2
    with open_output_folder(folder, last="a") as temporary:
        (temporary / "a").write_text("whole")
    assert names(tmp_path) == ["a.tsv", "folder"]


def test_what_a_living_process_writes_stays(tmp_path):
    target = tmp_path / "a.tsv"
    with open_output(target) as file:
        file.write(b"first")
        write_file(target, "second")
        assert Path(file.name).exists() and target.read_text() == "second"
    assert target.read_text() == "first" and names(tmp_path) == ["a.tsv"]


def test_only_temporary_files_of_the_same_output_are_removed(tmp_path):
    kept = [".a.tsv.tmp", ".a.tsv.0123456.tmp", ".b.tsv.01234567.tmp", ".axtsv.01234567.tmp"]
    for name in [*kept, ".a.tsv.01234567.tmp"]:
        (tmp_path / name).write_text("")
    (tmp_path / ".a.tsv.89abcdef.tmp").symlink_to(tmp_path / kept[0])
    os.mkfifo(tmp_path / ".a.tsv.aaaaaaaa.tmp")
    remove_stale(tmp_path / "a.tsv")
    assert names(tmp_path) == sorted([*kept, ".a.tsv.89abcdef.tmp", ".a.tsv.aaaaaaaa.tmp"])
    remove_stale(tmp_path / "absent" / "a.tsv")


def test_an_interruption_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), temporary_file(tmp_path / "a"):
        raise KeyboardInterrupt
    assert not names(tmp_path)
