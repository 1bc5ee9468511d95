"""Interleaved runs of several programs, and what is said of their times.

Machines drift: another process starts, the clock changes. Programs that are compared therefore take
turns, one sample each a round, so that a bad second is shared by all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence

from benchmarks.programs import Program

FEWEST = 3
"""Samples below which no median is reported."""

SAMPLE_SECONDS = 0.02
"""Shorter calls are repeated within a sample, as clocks and caches make single ones unsteady."""

MOST_CALLS = 500

PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds in which buffers are given back: one such pause, and more until nothing happens."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """How a call is billed.

    On a CPU it is processor time, so that other processes do not count, until the process is at
    rest: buffers are given back late and by other threads, and are this call's cost, too, not that
    of whoever comes next. On an accelerator it is the time on the wall until the last result is
    there, since calls are queued.

    Attributes:
      wall: time on the wall instead of processor time.
    """

    wall: bool = False

    def seconds(self, program: Program, calls: int) -> float:
        """Returns the seconds per call of one sample."""
        now = time.perf_counter if self.wall else time.process_time
        start = now()
        result = None
        for _ in range(calls):
            result = program.call()
            if not self.wall:
                program.wait(result)
        program.wait(result)
        del result
        if not self.wall:
            _rest()
        return (now() - start) / calls


def _rest() -> None:
    """Waits until this process no longer computes."""
    end = time.perf_counter() + LONGEST_PAUSE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < 0.02 * PAUSE:
            return


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a program may be measured.

    Attributes:
      repeats: samples of a program, rounded down to an odd number.
      seconds: per program; long calls get fewer samples, and none at all if the fewest would not
        fit.
    """

    repeats: int = 7
    seconds: float = 60.0

    def samples(self, call_seconds: float) -> int:
        """Returns the number of samples of calls of this length: odd, or 0 if too few fit."""
        fitting = self.repeats
        if call_seconds > 0:
            fitting = min(fitting, int(self.seconds / call_seconds))
        return 0 if fitting < FEWEST else fitting - (fitting + 1) % 2


def interleave(
    programs: Mapping[str, Program], clock: Clock, effort: Effort
) -> dict[str, tuple[float, ...]]:
    """Times programs in turn.

    Args:
      programs: by name.
      clock: how calls are billed.
      effort: how many samples are taken.

    Returns:
      Seconds per call of each sample; none for a program whose first call was too long.
    """
    plans = {}
    for name, program in programs.items():
        seconds = clock.seconds(program, 1)
        if seconds < SAMPLE_SECONDS:
            # First calls are slow: many more may fit in a sample.
            seconds = clock.seconds(program, _calls(seconds))
        plans[name] = (effort.samples(seconds), _calls(seconds))
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(max((count for count, _ in plans.values()), default=0)):
        for name, program in programs.items():
            count, calls = plans[name]
            if turn < count:
                samples[name].append(clock.seconds(program, calls))
    return {name: tuple(seconds) for name, seconds in samples.items()}


def _calls(seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / max(seconds, 1e-9))))


def median(samples: Sequence[float]) -> float | None:
    """Returns the median, or None without samples."""
    return statistics.median(samples) if samples else None


def spread(samples: Sequence[float]) -> float | None:
    """Returns the interquartile range over the median: how far a figure can be trusted."""
    if len(samples) < FEWEST:
        return None
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle
