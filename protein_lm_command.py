"""The console command ``protein-lm``.

It lies outside of the package, whose import takes a second: Ctrl-C must be obeyed before that, too.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> int:
    """Runs the command, see `fast_attention.protein_lm.cli.main`; returns the exit status."""
    # A process that was started with SIGINT ignored, as by nohup, ignores it still.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from fast_attention.protein_lm.cli import main as run

    return run()


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: nothing has been opened yet that would have to be closed."""
    os.write(2, b"protein-lm: stopped by SIGINT\n")
    os._exit(128 + number)
