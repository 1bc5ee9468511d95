import os
import signal
import threading

import pytest

from fast_attention.protein_lm.stopping import Stopped, catch_stop_requests

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def interrupts():
    """What a shell starts in the background ignores SIGINT; here it is as at a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def handlers():
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.mark.parametrize("number", NUMBERS)
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
    assert [Stopped(number, "").exit_status for number in NUMBERS] == [130, 143]
