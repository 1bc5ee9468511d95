"""Requests to stop, from the keyboard or a job scheduler, honoured where work can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A run stopped because it was asked to; everything it had done is saved.

    Attributes:
      exit_status: 128 and the number of the signal, as shells count: 130 after Ctrl-C, 143 after
        SIGTERM.
    """

    def __init__(self, number: int, message: str):
        """Takes the signal's number and what to tell."""
        super().__init__(message)
        self.exit_status = 128 + number


class StopRequest:
    """Whether somebody asked to stop; see `catch_stop_requests`.

    Attributes:
      signal: Number of the signal that came first, None as long as none did.
    """

    def __init__(self):
        """Begins without a request."""
        self.signal: int | None = None


@contextmanager
def catch_stop_requests() -> Iterator[StopRequest]:
    """Notes the first SIGINT or SIGTERM instead of obeying it at once; a second one is obeyed.

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
        for number in _SIGNALS:
            before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
