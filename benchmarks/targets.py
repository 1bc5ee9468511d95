"""What this package means to reach, as ratios of measured figures.

The widths are those of ``Setting()``: B=1 H=8 D=64 M=256 float32, on one core of a CPU. Accuracy
has no row here: the tests hold it.
"""

from __future__ import annotations

import dataclasses

from benchmarks.programs import BACKWARD, FORWARD
from benchmarks.results import DECODE, Results
from benchmarks.settings import Setting


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number: median seconds, or memory in arrays ``[B, T, H, D]``.

    Attributes:
      case: name of the case.
      measure: forward, f+b or decode.
      length: tokens; tokens before, for decoding.
      memory: the memory instead of the time.
    """

    case: str
    measure: str
    length: int
    memory: bool = False

    def value(self, results: Results) -> float | None:
        """Returns the number, or None if it was not measured."""
        row = results.row(self.case, self.measure, Setting(length=self.length))
        if row is None:
            return None
        if not self.memory:
            return row.seconds
        return None if row.memory is None else row.memory / row.setting.tensor_bytes


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a figure or on the ratio of two.

    Attributes:
      name: what is judged.
      figure: the figure, or the numerator.
      over: the denominator, if it is a ratio.
      at_least: lower bound.
      at_most: upper bound.
      scale: factor from the figure to the unit of the bounds.
      unit: printed after the numbers.
    """

    name: str
    figure: Figure
    over: Figure | None = None
    at_least: float | None = None
    at_most: float | None = None
    scale: float = 1.0
    unit: str = "x"

    @property
    def bound(self) -> float:
        """The bound, whichever it is."""
        bound = self.at_most if self.at_least is None else self.at_least
        assert bound is not None
        return bound

    def value(self, results: Results) -> float | None:
        """Returns what was measured, in the unit of the bounds; None if it was not."""
        value = self.figure.value(results)
        if value is None:
            return None
        if self.over is not None:
            below = self.over.value(results)
            if not below:
                return None
            value /= below
        return value * self.scale

    def missed_by(self, value: float) -> float:
        """Returns by which part of the bound it is missed; 0 if it is met."""
        miss = value - self.bound if self.at_least is None else self.bound - value
        return max(0.0, miss / self.bound)


CAUSAL, BOTH_WAYS = "causal/favor-chunked", "bidirectional/favor-chunked"
PER_TOKEN, WHOLE = "causal/per-token", "bidirectional/whole-sequence"
SDPA = "causal/torch-sdpa"
LONG_PAST = 100_000
"""Tokens before a step that must cost what the first one costs."""


def _faster(
    name: str, baseline: str, ours: str, measure: str, length: int, at_least: float
) -> Target:
    return Target(
        f"{name}, {measure}, {length} tokens",
        Figure(baseline, measure, length),
        Figure(ours, measure, length),
        at_least=at_least,
    )


def _above_floor(ours: str, measure: str, length: int, at_most: float) -> Target:
    return Target(
        f"{ours.partition('/')[0]} / floor, {measure}, {length} tokens",
        Figure(ours, measure, length),
        Figure("floor", FORWARD, length),
        at_most=at_most,
    )


def _crossover(exact: str) -> Target:
    label = exact.partition("/")[2]
    return _faster(f"{label} / causal (crossover)", exact, CAUSAL, BACKWARD, 512, at_least=1.0)


TARGETS: tuple[Target, ...] = (
    *(
        _faster("scan over tokens / causal", PER_TOKEN, CAUSAL, measure, length, at_least)
        for measure, at_least in ((FORWARD, 4.0), (BACKWARD, 4.5))
        for length in (4096, 16384)
    ),
    _faster("two einsums / bidirectional", WHOLE, BOTH_WAYS, FORWARD, 4096, 5.0),
    _faster("two einsums / bidirectional", WHOLE, BOTH_WAYS, BACKWARD, 4096, 4.0),
    _faster("torch SDPA / causal", SDPA, CAUSAL, BACKWARD, 4096, 8.0),
    _faster("torch SDPA / causal", SDPA, CAUSAL, BACKWARD, 16384, 22.0),
    *(
        _faster(f"exact / local, {kind}", f"{kind}/exact", f"{kind}/local", measure, 16384, 10.0)
        for kind in ("causal", "bidirectional")
        for measure in (FORWARD, BACKWARD)
    ),
    _crossover(SDPA),
    _crossover("causal/exact"),
    *(
        _above_floor(ours, measure, 4096, at_most)
        for ours, measure, at_most in (
            (BOTH_WAYS, FORWARD, 1.25),
            (BOTH_WAYS, BACKWARD, 3.2),
            (CAUSAL, FORWARD, 1.6),
            (CAUSAL, BACKWARD, 4.5),
        )
    ),
    Target(
        "memory of causal f+b, 16384 tokens, in arrays [B, T, H, D]",
        Figure(CAUSAL, BACKWARD, 16384, memory=True),
        at_most=5.5,
        unit="",
    ),
    Target(
        "decoding, a step within a scan",
        Figure("decode/scan", DECODE, 0),
        at_most=20,
        scale=1e6,
        unit="us",
    ),
    Target(
        "decoding, one jitted call",
        Figure("decode/call", DECODE, 0),
        at_most=60,
        scale=1e6,
        unit="us",
    ),
    Target(
        f"decoding, a step after {LONG_PAST} tokens / after none",
        Figure("decode/scan", DECODE, LONG_PAST),
        Figure("decode/scan", DECODE, 0),
        at_most=1.15,
    ),
)
