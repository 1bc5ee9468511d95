"""Runs cases over lengths: everything of one length is compiled, then timed in turn."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence

from benchmarks.cases import Case
from benchmarks.programs import Program
from benchmarks.results import Row
from benchmarks.settings import Inputs, Setting, make_inputs
from benchmarks.timing import FEWEST, Clock, Effort, interleave, spread


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may take, and how it is timed."""

    clock: Clock
    effort: Effort
    memory: int


def select(cases: Iterable[Case], patterns: Sequence[str]) -> tuple[Case, ...]:
    """Returns the cases whose name matches a pattern, all of them for no pattern.

    Raises:
      ValueError: if a pattern matches nothing.
    """
    cases = tuple(cases)
    names = [case.info.name for case in cases]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"No case matches {pattern!r}; the cases are {names}.")
    return tuple(
        case
        for case in cases
        if not patterns or any(fnmatch.fnmatch(case.info.name, pattern) for pattern in patterns)
    )


def measure_lengths(
    cases: Sequence[Case],
    shape: Setting,
    lengths: Sequence[int],
    measures: Sequence[str],
    limits: Limits,
) -> list[Row]:
    """Measures cases at ascending lengths.

    A program that would take too long, judged by its time at the last length, or too much memory is
    left out, with the reason in its row.

    Args:
      cases: what is measured.
      shape: the shape; its length is ignored.
      lengths: lengths.
      measures: some of :data:`benchmarks.programs.MEASURES`.
      limits: time and memory.

    Returns:
      A row for each case, length and measure.
    """
    rows: list[Row] = []
    for length in sorted(lengths):
        inputs = make_inputs(dataclasses.replace(shape, length=length))
        wanted = [(case, m) for case in cases for m in measures if m in case.measures]
        rows += _measure_together(wanted, inputs, rows, limits)
    return rows


def _measure_together(
    wanted: Sequence[tuple[Case, str]], inputs: Inputs, before: Sequence[Row], limits: Limits
) -> list[Row]:
    programs: dict[str, Program] = {}
    planned: dict[str, Row] = {}
    for case, measure in wanted:
        row = Row(case.info.name, measure, inputs.setting)
        reason = _too_long(case, row, before, limits.effort)
        if reason is None:
            compiled = _compile(case, inputs, measure, limits.memory)
            if isinstance(compiled, Program):
                programs[f"{case.info.name} {measure}"] = compiled
                row = dataclasses.replace(row, memory=compiled.memory)
            else:
                reason = compiled
        planned[f"{case.info.name} {measure}"] = dataclasses.replace(row, left_out=reason)
    samples = interleave(programs, limits.clock, limits.effort)
    rows = []
    for name, row in planned.items():
        if name in programs:
            reason = None if samples[name] else _over(limits.effort)
            row = dataclasses.replace(row, samples=samples[name], left_out=reason)
        _show(row, {(r.case, r.left_out) for r in before})
        rows.append(row)
    return rows


def _compile(case: Case, inputs: Inputs, measure: str, limit: int) -> Program | str:
    """Returns the program, or why there is none."""
    try:
        program = case.compile(inputs, measure)
    except NotImplementedError as error:
        return f"cannot serve this: {error}"
    if program.memory is not None and program.memory > limit:
        return "needs more than half of the memory"
    return program


def _too_long(case: Case, row: Row, before: Sequence[Row], effort: Effort) -> str | None:
    """Returns why a case is not even compiled, or None."""
    if case.max_length is not None and row.setting.length > case.max_length:
        return f"not measured beyond {case.max_length} tokens"
    last = [r for r in before if (r.case, r.measure) == (row.case, row.measure)]
    if not last:
        return None
    if last[-1].left_out is not None:
        return last[-1].left_out
    assert last[-1].seconds is not None
    growth = (row.setting.length / last[-1].setting.length) ** case.order
    return None if effort.samples(last[-1].seconds * growth) else _over(effort)


def _over(effort: Effort) -> str:
    return f"{FEWEST} calls take longer than {effort.seconds:g} s"


def _show(row: Row, known: set[tuple[str, str | None]]) -> None:
    """Prints progress; the reason for leaving a case out only once."""
    name = f"{row.setting.length:7d}  {row.case:32s} {row.measure:8s}"
    if row.seconds is not None:
        print(f"{name} {row.seconds * 1e3:10.2f} ms  spread {spread(row.samples) or 0:4.0%}")
    elif (row.case, row.left_out) not in known:
        print(f"{name} left out: {row.left_out}")
