import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fast_attention.protein_lm.compilation_cache import (
    cache_folder,
    keep_compiled_programs,
    shrink,
)

PROGRAM = """
import jax
from fast_attention.protein_lm.compilation_cache import keep_compiled_programs
keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    """From variables of the environment to the folder that JAX is told, None for none."""
    # As in a container whose user has no entry.
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)

    def folder(**environment):
        given = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)} | environment
        with monkeypatch.context() as patch:
            for name, value in given.items():
                if value is None:
                    patch.delenv(name, raising=False)
                else:
                    patch.setenv(name, value)
            found = {}
            patch.setattr(jax.config, "update", found.__setitem__)
            keep_compiled_programs()
        return found.get("jax_compilation_cache_dir")

    return folder


def test_a_process_keeps_its_programs(tmp_path, monkeypatch):
    given = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    given |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(program, env=given, capture_output=True, text=True, check=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert done.stdout.strip() == str(cache_folder())


def test_programs_are_kept_where_only_the_user_writes(told, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert told() == str(folder)
    assert folder.is_relative_to(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Another user could put a program of theirs here.
    folder.chmod(0o777)
    assert told() is None


def test_a_folder_of_the_user_or_none_is_respected(told, tmp_path):
    """JAX takes it from the environment."""
    for own in ("", str(tmp_path / "own")):
        assert told(JAX_COMPILATION_CACHE_DIR=own) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_done_without(told, tmp_path):
    (tmp_path / "fast-attention").touch()
    (tmp_path / "Library").touch()
    assert told() is None


def test_a_user_without_a_home_folder_has_no_cache(told):
    assert told(HOME=None, XDG_CACHE_HOME=None) is None


@pytest.mark.parametrize("home", [None, "home"])
def test_programs_beside_the_data_are_not_run(told, tmp_path, home):
    assert told(HOME=home, XDG_CACHE_HOME="caches") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("most", "left"), [(400, "abcd"), (399, "d"), (200, "d")])
def test_what_was_used_last_is_kept(tmp_path, most, left):
    for number, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "folder").mkdir()
    shrink(tmp_path, most)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "folder"]
