"""Starts ``protein-lm train`` on several processes of this machine."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Sequence

from tests.protein_lm.killing import start


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start_all(arguments: Sequence[str], number: int, **environment: str) -> list[subprocess.Popen]:
    """Starts the command in so many processes, which join each other."""
    joining = [f"--coordinator=localhost:{free_port()}", f"--num_processes={number}"]
    return [
        start([*arguments, *joining, f"--process_id={index}"], **environment)
        for index in range(number)
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[tuple]:
    """Exit status, stdout and stderr of each, when all have ended."""
    killer = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    killer.start()
    found = [process.communicate() for process in processes]
    killer.cancel()
    return [(process.returncode, *told) for process, told in zip(processes, found, strict=True)]
