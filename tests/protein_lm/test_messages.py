import io
import sys

import pytest

from fast_attention.protein_lm import messages


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the module reads, as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_a_line_a_minute(clock, capsys):
    with messages.progress("training", "steps", total=400, initial=100) as bar:
        for _ in range(150):
            clock[0] += 1
            bar.set_postfix({"loss": "2.9"})
            bar.update()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "training: 160 of 400 steps, 4.0 minutes left, loss 2.9",
        "training: 220 of 400 steps, 3.0 minutes left, loss 2.9",
    ]


def test_time_before_a_pause_does_not_count(clock, capsys):
    with messages.progress("training", "steps", total=100) as bar:
        clock[0] += 1000
        bar.unpause()
        for _ in range(3):
            clock[0] += 10
            bar.update()
    assert capsys.readouterr().err.splitlines()[-1].startswith("training: 1 of 100 steps, 16.5 min")


def test_of_an_unknown_total_what_is_done_is_told(clock, capsys):
    with messages.progress("score", "residues") as bar:
        clock[0] = 61
        bar.update(12345)
    assert capsys.readouterr().err == "score: 12,345 residues\n"


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(messages.counting("abc", "sampling", "proteins", 3)) == ["a", "b", "c"]
    assert "sampling" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_leaves_out_notes_and_progress(monkeypatch, clock, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    with messages.quietly(True), messages.progress("score", "residues") as bar:
        clock[0] = 61
        bar.update(5)
        messages.note("a note")
    assert sys.stderr.getvalue() == ""
    messages.note("a note")
    assert sys.stderr.getvalue() == "a note\n"
