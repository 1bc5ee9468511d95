import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_targets import OutputError
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.runs.run_lock import hold_run

HOLD = """
import sys, time
from pathlib import Path
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.runs.run_lock import hold_run
with hold_run(RunFolder(Path(sys.argv[1]))):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_another_process_is_named_until_it_is_dead(tmp_path):
    """The same folder by another path; and a lock that a killed process has left behind."""
    run, link = tmp_path / "run", tmp_path / "link"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        link.symlink_to(run)
        expected = f"process {process.pid} on host {socket.gethostname()}"
        with pytest.raises(RunError, match=f"link is in use: {expected}.*--work_dir"):
            hold_run(RunFolder(link)).__enter__()
        process.send_signal(signal.SIGKILL)
    assert json.loads(RunFolder(run).lock.read_text())["process"] == process.pid
    with hold_run(RunFolder(link)):
        assert json.loads(RunFolder(run).lock.read_text())["process"] == os.getpid()
    assert not any(run.iterdir())


def test_two_trainings_of_one_process_exclude_each_other(tmp_path):
    with hold_run(RunFolder(tmp_path)):
        with pytest.raises(RunError, match=f"process {os.getpid()}"):
            hold_run(RunFolder(tmp_path)).__enter__()
        assert RunFolder(tmp_path).lock.exists()
    with hold_run(RunFolder(tmp_path)):
        pass


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    run = RunFolder(tmp_path / "runs" / "a")
    with pytest.raises(ZeroDivisionError), hold_run(run):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    with hold_run(run):
        run.config.touch()
    assert [path.name for path in run.path.iterdir()] == ["config.gin"]


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("content")
    RunFolder(tmp_path).lock.symlink_to(other)
    with pytest.raises(OutputError, match="cannot be written to"):
        hold_run(RunFolder(tmp_path)).__enter__()
    assert other.read_text() == "content"


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "run").touch()
    (tmp_path / "link").symlink_to("unmounted")
    with pytest.raises(RunError, match=r"link is a link to unmounted, which does not exist"):
        hold_run(RunFolder(tmp_path / "link")).__enter__()
    with pytest.raises(RunError, match="is not a folder"):
        hold_run(RunFolder(tmp_path / "run")).__enter__()
