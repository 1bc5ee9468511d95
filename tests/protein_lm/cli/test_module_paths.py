"""The commands import modules as an installed program does, not from the current folder."""

import os
import subprocess
import sys

import pytest

from fast_attention.protein_lm.distributed import huge_pages

MARK = "open('imported', 'a').write(__name__)\nraise ImportError('not the module of Python')\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are a matter of Linux")
def test_a_restart_keeps_the_arguments_and_leaves_out_the_current_folder(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/protein-lm", "train", "--steps=2"])
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.35"))
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    huge_pages.restart_with_huge_pages()
    ((path, command, environment),) = started
    assert path == command[0] == sys.executable
    assert command[-3:] == ["/bin/protein-lm", "train", "--steps=2"]
    assert sys.flags.safe_path or command[1] == "-P"
    assert huge_pages.TUNABLES in environment
    monkeypatch.setenv(huge_pages.TUNABLES, "")
    huge_pages.restart_with_huge_pages()
    assert len(started) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("-P",), ("random", "zipfile", "tensorboardX", "grain")),
        # Python itself imports the packages above __main__ before this program can do anything.
        ((), ("tensorboardX", "grain")),
    ],
    ids=["safe_path", "current_folder_first"],
)
def test_nothing_is_imported_from_the_current_folder(tmp_path, options, names):
    for name in names:
        (tmp_path / f"{name}.py").write_text(MARK)
    (tmp_path / "matplotlibrc").write_text(f"backend: module://{names[0]}\n")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    found = subprocess.run(
        [sys.executable, *options, "-m", "fast_attention.protein_lm", "train", "--work_dir=run"]
        + ["--gin_file=/nonexistent.gin"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1 and "/nonexistent.gin" in found.stderr
    assert not (tmp_path / "imported").exists(), found.stderr
