import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fast_attention.protein_lm.compilation_cache import cache_folder, shrink

PROGRAM = """
import pwd
import jax
from fast_attention.protein_lm.compilation_cache import keep_compiled_programs
pwd.getpwuid = {}.__getitem__  # As in a container whose user has no entry.
keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
"""


def told(tmp_path, **environment):
    """The folder that JAX uses after the call, in a fresh process."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    given |= {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)} | environment
    given = {name: value for name, value in given.items() if value is not None}
    given["PYTHONPATH"] = str(Path(__file__).parents[2])
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        program, env=given, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_programs_are_kept_where_only_the_user_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = cache_folder()
    assert told(tmp_path) == str(folder)
    assert folder.is_relative_to(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Another user could put a program of theirs here.
    folder.chmod(0o777)
    assert told(tmp_path) == "None"


def test_a_folder_of_the_user_or_none_is_respected(tmp_path):
    assert told(tmp_path, JAX_COMPILATION_CACHE_DIR="") in ("", "None")
    assert told(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == str(tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "fast-attention").touch()
    (tmp_path / "Library").touch()
    assert told(tmp_path) == "None"


def test_a_user_without_a_home_folder_has_no_cache(tmp_path):
    assert told(tmp_path, HOME=None, XDG_CACHE_HOME=None) == "None"


@pytest.mark.parametrize("home", [None, "home"])
def test_programs_beside_the_data_are_not_run(tmp_path, home):
    assert told(tmp_path, HOME=home, XDG_CACHE_HOME="caches") == "None"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("most", "left"), [(400, "abcd"), (399, "d"), (200, "d")])
def test_what_was_used_last_is_kept(tmp_path, most, left):
    for number, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "folder").mkdir()
    shrink(tmp_path, most)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "folder"]
