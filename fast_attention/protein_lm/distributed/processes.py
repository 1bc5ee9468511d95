"""Several processes that run one program together, by JAX's own distributed runtime.

Every process runs the same commands in the same order, on the devices of all; the first one, the
*primary*, alone writes files and prints messages. A process that fails ends at once, without
waiting for the others. The others notice it: their next common operation fails, or the runtime
ends them. In both cases they print what to do, see `joined`.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.distributed import process_arrays
from fast_attention.protein_lm.distributed.stopping import Stopped
from fast_attention.protein_lm.errors import RunError, UsageError

JOIN_TIMEOUT = 300
"""Default time in seconds in which all processes must have connected."""

# Matches errors of collectives (Gloo, NCCL) and of the coordination service when another process
# has ended.
_LOST = re.compile(
    r"gloo.*(failed|closed|reset|timed? ?out)|nccl.*(remote|abort|unhandled)|"
    r"coordination ?service|heartbeat|barrier|socket closed|connection (closed|reset|refused)|"
    r"unhealthy|task has died",
    re.IGNORECASE | re.DOTALL,
)
# A process that fails waits this long before it ends: the others may be about to fail for the same
# reason, and should report that reason and not the loss of this process.
_GRACE_SECONDS = 1.0


def count() -> int:
    """Number of processes that run the program."""
    return jax.process_count()


def is_primary() -> bool:
    """Whether this is the process that writes files and prints messages."""
    return jax.process_index() == 0


def report(text: str) -> None:
    """Prints to stdout, in the primary alone."""
    if is_primary():
        print(text)


def note(text: str, kind: str = "note") -> None:
    """Prints a line to stderr that begins with its kind, in the primary alone.

    ``--quiet`` leaves out notes, but no line of another kind.
    """
    if is_primary() and not (kind == "note" and messages.is_quiet()):
        print(f"{kind}: {text}", file=sys.stderr)


def in_turn(act: Callable[[], None]) -> None:
    """Calls `act` first in the primary, and in the others after that has succeeded.

    Raises:
      RunError: In the others, if it failed in the primary.
    """
    failed = True
    try:
        if is_primary():
            act()
        failed = False
    finally:
        failed = process_arrays.any_process(failed and is_primary())
    if not is_primary():
        if failed:
            raise RunError("process 0 has failed: see its error message")
        act()


@contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = JOIN_TIMEOUT,
    remedy: Callable[[], str] = str,
) -> Iterator[None]:
    """Joins the other processes; must come before JAX has touched a device.

    Without arguments, JAX looks for what started the processes: Slurm, Open MPI, Cloud TPU,
    Kubernetes. What the body raises ends this process at its exit without the others; the loss of
    another is raised as `RunError`, or printed at once if the runtime ends this process.

    Args:
      coordinator: ``host:port`` of process 0, where it will listen.
      num_processes: How many there are.
      process_id: Number of this one, from 0 on.
      timeout: Seconds in which all must have connected.
      remedy: Returns what to do when a process was lost, for the message.

    Raises:
      RunError: If not all came in time, or one was lost later.
      ValueError: If the arguments are not what they should be.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    _check(given, timeout)
    ending = _Ending(remedy)
    not_joined = _not_joined(coordinator, process_id, timeout)
    with _silenced() as ending.stderr, ending.at_abort(not_joined):
        _initialize(coordinator, num_processes, process_id, timeout)
    with ending.at_abort(None):
        try:
            yield
        except Stopped:
            # All processes stop together.
            raise
        except BaseException as error:
            status = 130 if isinstance(error, KeyboardInterrupt) else 1
            ending.leave_alone(getattr(error, "exit_status", status))
            if isinstance(error, Exception) and is_lost_process(error):
                raise RunError(ending.lost(str(error))) from error
            raise


def _check(given: dict[str, str | int | None], timeout: int) -> None:
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UsageError(
            f"{', '.join(missing)} missing: give --coordinator, --num_processes and --process_id "
            "together, or only --distributed if Slurm, Open MPI, Kubernetes or Cloud TPU started "
            "the processes"
        )
    if timeout < 1:
        raise UsageError(f"--join_timeout must be at least 1 second; got {timeout}")
    if missing:
        return
    coordinator, number, index = given.values()
    port = re.fullmatch(r".+:(\d+)", str(coordinator))
    if not port or not 0 < int(port[1]) < 65536:
        raise UsageError(
            f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234, the machine of process 0 "
            f"and a free port there; got {coordinator!r}"
        )
    if int(number or 0) < 1:
        raise UsageError(f"--num_processes must be at least 1; got {number}")
    if not 0 <= int(index or 0) < int(number or 0):
        raise UsageError(
            f"--process_id must be from 0 to {int(number or 0) - 1}, one number for each of the "
            f"{number} processes; got {index}"
        )


def _initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    # Collectives between the CPUs of several processes; other devices have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would catch SIGTERM, which `stopping` does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout
        )
    except ValueError as error:
        if coordinator is not None:
            raise
        raise RunError(
            f"--distributed found no launcher of several processes ({error}): start them "
            "by Slurm (srun), Open MPI (mpirun), Kubernetes or on Cloud TPU, or give each "
            "--coordinator, --num_processes and --process_id"
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"{_not_joined(coordinator, process_id, timeout)} ({str(error).splitlines()[0]})"
        ) from error
    jax.process_count()


def _not_joined(coordinator: str | None, process_id: int | None, timeout: int) -> str:
    where = coordinator or "the coordinator that was found"
    if process_id == 0:
        return (
            f"not all processes have connected to {where} within {timeout} s (--join_timeout): "
            "start "
            "all of them, with the same --coordinator and --num_processes and each with its own "
            "--process_id, and check that the port is free on this machine and can be reached "
            "from the others"
        )
    return (
        f"process 0 was not reached at {where}, or not all processes have connected, within "
        f"{timeout} s "
        "(--join_timeout): check that process 0 runs on the machine of that name, that no "
        "firewall blocks the port, and that --coordinator and --num_processes are the same "
        "everywhere and each --process_id is given once"
    )


def is_lost_process(error: Exception) -> bool:
    """Whether an error means that another process has ended."""
    if isinstance(error, RunError | OSError) or count() == 1:
        return False
    return bool(_LOST.search(str(error)))


class _Ending:
    """Ends this process after a failure."""

    def __init__(self, remedy: Callable[[], str]):
        self.stderr = 2
        self.reported = False
        self._remedy = remedy

    def lost(self, reason: str) -> str:
        """The message when another process was lost."""
        line = next(iter(reason.splitlines()), "")[:200]
        return (
            f"another process of this run was lost{f' ({line})' if line else ''}: "
            "it was killed, its machine failed, or it ended with an error. " + self._remedy()
        )

    def leave_alone(self, status: int) -> None:
        """Ends this process at its exit without waiting for the others, which may have ended."""
        self.reported = True

        def leave() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            # The message is printed; what the runtime prints after it is dropped.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(_GRACE_SECONDS)
            os._exit(status)

        # Runs before what JAX has registered.
        atexit.register(leave)

    @contextmanager
    def at_abort(self, message: str | None) -> Iterator[None]:
        """Prints `message`, or that a process was lost, when the runtime ends this process.

        The runtime calls abort() in a thread of its own as soon as it knows that process 0 has
        ended, or that another has not answered for long. Python's own handlers run in the main
        thread, which may wait for that very process: the C library's handler is needed.
        """

        def report_loss(number: int) -> None:
            with suppress(BaseException):
                if self.reported:
                    # The message of the main thread is under way.
                    time.sleep(2 * _GRACE_SECONDS)
                else:
                    text = message or self.lost("")
                    os.write(self.stderr, f"\nprotein-lm: error: {text}\n".encode())
            os._exit(1)

        handler = _HANDLER(report_loss)
        _handlers.append(handler)
        library = ctypes.CDLL(None)
        library.signal.restype = ctypes.c_void_p
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        before = library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
        try:
            yield
        finally:
            # After a failure the runtime can end this process until it has left by itself.
            if not self.reported:
                library.signal(signal.SIGABRT, before)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
# What the C library may call must not be collected.
_handlers: list[Any] = []


@contextmanager
def _silenced() -> Iterator[int]:
    """Keeps the runtime's own report of a failed meeting off stderr, whose copy is yielded."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield stderr
        finally:
            os.dup2(stderr, 2)
