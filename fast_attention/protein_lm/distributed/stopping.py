"""Requests to stop, from the keyboard or a job scheduler, obeyed where work can be saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What the keyboard, a job scheduler and a closed terminal send."""

_REPEAT = 0.5
"""Seconds after which a signal is repeated whose exception was dropped."""


class Stopped(Exception):
    """A run stopped because it was asked to; everything it had done is saved.

    Attributes:
      exit_status: 128 and the number of the signal, as shells count: 130 after Ctrl-C, 143 after
        SIGTERM, 129 after SIGHUP.
    """

    def __init__(self, number: int, message: str):
        """Takes the signal's number and the message."""
        super().__init__(message)
        self.exit_status = 128 + number


class Interrupted(KeyboardInterrupt):
    """A signal ended a command.

    Attributes:
      exit_status: As in `Stopped`.
    """

    def __init__(self, number: int):
        """Takes the signal's number."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raises `Interrupted` in the block at the first of `SIGNALS`, so that it cleans up.

    While the exception unwinds the block, further signals are ignored: a second Ctrl-C must not
    stop the deletion of temporary files. Python drops an exception that is raised in a finalizer or
    a callback of the garbage collector, so the signal is repeated until the block has ended.

    A signal that the parent process chose to ignore, as ``nohup`` does, stays ignored. Outside of
    the main thread nothing changes.
    """
    before: dict[int, Any] = {}
    main = threading.main_thread()
    ended, lock = threading.Event(), threading.Lock()
    received: list[int] = []

    def repeat() -> None:
        while not ended.wait(_REPEAT):
            with lock:
                if not ended.is_set():
                    signal.pthread_kill(main.ident or 0, received[0])

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _unwinds(sys.exc_info()[1]):
            return
        if not received:
            received.append(number)
            threading.Thread(target=repeat, daemon=True).start()
        raise Interrupted(received[0])

    def report(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            report_before(dropped)

    report_before = sys.unraisablehook
    if threading.current_thread() is main:
        # What is repeated need not be reported.
        sys.unraisablehook = report
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        with lock:
            ended.set()
        if sys.unraisablehook is report:
            sys.unraisablehook = report_before
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _unwinds(error: BaseException | None) -> bool:
    """Whether an exception is, or came up while handling, `Interrupted`."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error is not None


class StopRequest:
    """Whether a stop was requested; see `catch_stop_requests`.

    Attributes:
      signal: Number of the signal that came first, None as long as none did.
    """

    def __init__(self):
        """Begins without a request."""
        self.signal: int | None = None


@contextmanager
def catch_stop_requests() -> Iterator[StopRequest]:
    """Notes the first of `SIGNALS` instead of obeying it at once; a second one is obeyed.

    A SIGHUP that is ignored, as ``nohup`` has it, stays ignored.

    The handlers from before are back afterwards. Outside of the main thread, where Python lets
    nobody handle signals, nothing is caught.

    Yields:
      What to look at when there is time.
    """
    request = StopRequest()
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        restore()


def stopped(number: int, step: int) -> Stopped:
    """The error that names a signal, with the way to resume.

    Args:
      number: Of the signal.
      step: The step that was just saved.
    """
    name = signal.Signals(number).name
    return Stopped(
        number,
        f"stopped by {name} after step {step}, which is saved: run the same command to resume",
    )
