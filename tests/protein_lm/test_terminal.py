import io
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from fast_attention.protein_lm.terminal import TerminalText, escape_controls, for_terminal


def written(*texts: str, encoding: str = "utf-8") -> bytes:
    content = io.BytesIO()
    stream = TerminalText(content, encoding=encoding, errors="backslashreplace")
    for text in texts:
        assert stream.write(text) == len(text)
    stream.flush()
    return content.getvalue()


@pytest.mark.parametrize(
    "control",
    ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\x08", "a\rb", "\x00", "\x7f", "\u202e", "\u2028"],
    ids=ascii,
)
def test_control_characters_are_escaped(control):
    told = written(f"error: {control}: absent\n").decode()
    assert told == escape_controls(f"error: {control}: absent\n")
    assert all(letter.isprintable() for letter in told[:-1]) and "\\" in told


def test_other_text_stays():
    text = "perplexity\t20.1\n\n  é 蛋白 +- 1 %\n"
    assert written(text).decode() == text
    assert written("é 蛋\n", encoding="ascii") == b"\\xe9 \\u86cb\n"


def test_a_progress_bar_works():
    content = io.BytesIO()
    plain = io.TextIOWrapper(content, encoding="utf-8", write_through=True)
    stream = for_terminal(plain)
    with tqdm(total=2, file=stream, mininterval=0, desc="one\x1b[31m") as bar:
        bar.update(2)
    told = content.getvalue().decode()
    assert told.startswith("\rone") and "2/2" in told
    assert "\x1b[31m" not in told and "\\r" not in told


def test_messages_of_a_command_escape_names_of_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fast_attention.protein_lm", "info", "--run_dir=a\x1b[31mb"],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 1
    assert b"\\x1b[31mb" in done.stderr and b"\x1b" not in done.stderr + done.stdout
