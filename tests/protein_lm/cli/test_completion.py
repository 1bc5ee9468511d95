import re
import shutil
import subprocess
import sys

import pytest

import fast_attention
from fast_attention.protein_lm import cli


def completion(shell, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", shell])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_options_and_choices(capsys, tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(completion("bash", capsys))
    (tmp_path / "a.fasta").touch()
    asked = f"""
    source {script}
    complete=$(complete -p protein-lm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    ask() {{
      COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
      $complete protein-lm "${{@: -1}}" "${{@: -2:1}}"
      echo "${{COMPREPLY[@]}}"
    }}
    cd {tmp_path}
    ask protein-lm sco
    ask protein-lm score --tok
    ask protein-lm score --on_error ""
    ask protein-lm score --fasta a.f
    """
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    commands, options, choices, files = done.stdout.splitlines()
    assert commands == "score"
    assert options == "--tokens_per_batch"
    assert choices == "raise skip replace"
    assert files == "a.fasta"


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_are_told_every_option(shell, capsys):
    told = completion(shell, capsys)
    assert "protein-lm" in told and "tokens_per_batch" in told


def test_an_unknown_shell_is_an_error_of_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", "cmd"])
    assert stopped.value.code == 2
    assert "bash" in capsys.readouterr().err


def test_without_shtab_the_remedy_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print-completion", "bash"])
    assert stopped.value.code == 2
    assert "fast-attention[completion]" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"protein-lm (.+)\n", capsys.readouterr().out)[1] == (
        fast_attention.__version__
    )
