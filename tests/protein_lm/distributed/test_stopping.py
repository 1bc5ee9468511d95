import os
import signal
import sys
import threading
import time

import pytest

from fast_attention.protein_lm.distributed import stopping
from fast_attention.protein_lm.distributed.stopping import (
    SIGNALS,
    Interrupted,
    Stopped,
    catch_stop_requests,
    interrupt_on_signals,
)
from fast_attention.protein_lm.files.output_files import open_output, open_output_folder


@pytest.fixture(autouse=True)
def interrupts():
    """A shell may start processes with SIGINT or SIGHUP ignored; here none is."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_noted_and_the_handlers_come_back(number):
    before = handlers()
    with catch_stop_requests() as request:
        assert request.signal is None
        os.kill(os.getpid(), number)
        assert request.signal == number
        # A second one would be obeyed.
        assert handlers() == before
    assert handlers() == before


def test_a_second_interrupt_is_obeyed():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), catch_stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_handlers_come_back_without_a_signal_and_after_an_error():
    before = handlers()
    with catch_stop_requests() as request:
        assert handlers() != before
    assert request.signal is None and handlers() == before
    with pytest.raises(ZeroDivisionError), catch_stop_requests():
        raise ZeroDivisionError
    assert handlers() == before


def test_a_thread_catches_nothing():
    before = handlers()
    found = []

    def work():
        with catch_stop_requests() as request:
            found.append((request.signal, handlers()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_exit_statuses_are_those_of_shells():
    assert [Stopped(number, "").exit_status for number in SIGNALS] == [130, 143, 129]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_interrupted_block_cleans_up_whatever_else_comes(tmp_path, number):
    before = {other: signal.getsignal(other) for other in SIGNALS}
    (tmp_path / "old").write_text("old")
    with (
        pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught,
        interrupt_on_signals(),
        open_output(tmp_path / "old") as file,
        open_output_folder(tmp_path / "new", last="a"),
    ):
        try:
            file.write(b"new")
            os.kill(os.getpid(), number)
        finally:
            for other in SIGNALS:
                os.kill(os.getpid(), other)
    assert caught.value.exit_status == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"
    assert {other: signal.getsignal(other) for other in SIGNALS} == before


def test_an_interruption_that_python_drops_is_repeated(monkeypatch):
    """As when a signal arrives while the garbage collector runs a callback."""
    monkeypatch.setattr(stopping, "_REPEAT", 0.01)
    reported, arrived = [], []

    class Finalized:
        def __del__(self):
            arrived.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)

    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    with pytest.raises(Interrupted), interrupt_on_signals():
        Finalized()
        assert arrived
        time.sleep(30)
        raise AssertionError("the signal was lost")
    assert not reported
    # The errors of others are reported as before.
    assert sys.unraisablehook == reported.append


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_on_signals(), catch_stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
