"""Runs over lengths: what is left out, and why; turns, medians and spreads; decoding."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import decode, suite, timing
from benchmarks.cases import Case
from benchmarks.programs import FORWARD, Program
from benchmarks.results import CaseInfo
from benchmarks.settings import Setting
from benchmarks.timing import Clock, Effort, interleave, median, spread

SHAPE = Setting(batch=1, heads=2, head_dim=4, features=8)
LIMITS = suite.Limits(Clock(wall=True), Effort(repeats=3, seconds=1.0), memory=10**9)


@dataclasses.dataclass(frozen=True)
class FakeClock(Clock):
    """Bills each program what its memory says, in milliseconds."""

    log: list = dataclasses.field(default_factory=list)

    def seconds(self, program, calls):
        assert program.memory is not None
        self.log.append(program.memory)
        return program.memory * 1e-3


def taking(milliseconds: int) -> Program:
    return Program(lambda: None, lambda _: None, memory=milliseconds)


def test_programs_take_turns():
    clock = FakeClock()
    samples = interleave({"a": taking(100), "b": taking(200)}, clock, Effort(3, 10.0))
    assert clock.log == [100, 200] * 4
    assert samples == {"a": (0.1,) * 3, "b": (0.2,) * 3}


@pytest.mark.parametrize(
    "seconds, samples", [(0.0, 7), (1.0, 7), (1.5, 5), (2.4, 3), (3.3, 3), (3.4, 0)]
)
def test_long_calls_get_fewer_samples_of_an_odd_number(seconds, samples):
    assert Effort(repeats=7, seconds=10.0).samples(seconds) == samples


def test_even_repeats_are_rounded_down():
    assert Effort(repeats=8, seconds=10.0).samples(0.1) == 7


def test_a_program_that_is_too_long_after_all_has_no_samples():
    assert interleave({"a": taking(500)}, FakeClock(), Effort(3, 1.0)) == {"a": ()}


def test_median_and_spread():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert median([]) is None and spread([1.0, 2.0]) is None


def test_processor_time_counts_work_and_not_sleep(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.01)
    busy = Program(lambda: sum(range(10**6)), lambda _: None)
    assert Clock().seconds(busy, 2) > 1e-3
    idle = Program(lambda: timing.time.sleep(0.05), lambda _: None)
    assert Clock().seconds(idle, 1) < 0.03
    assert Clock(wall=True).seconds(idle, 1) > 0.04


def run(compile_, lengths=(8, 16), **options):
    limits = dataclasses.replace(LIMITS, clock=FakeClock())
    cases = [Case(CaseInfo("a", "A"), compile_, **options)]
    return suite.measure_lengths(cases, SHAPE, lengths, (FORWARD,), limits)


def test_lengths_are_measured_in_ascending_order():
    rows = run(lambda inputs, measure: taking(inputs.setting.length), lengths=(16, 8))
    assert [(row.setting.length, row.seconds) for row in rows] == [(8, 0.008), (16, 0.016)]


def test_what_would_take_too_long_is_not_compiled():
    def compile_(inputs, measure):
        assert inputs.setting.length == 8
        return taking(200)

    rows = run(compile_, lengths=(8, 16, 32), order=2)
    assert [row.seconds for row in rows] == [0.2, None, None]
    assert rows[1].left_out == rows[2].left_out == "3 calls take longer than 1 s"


def test_a_case_that_cannot_serve_says_why(capsys):
    def compile_(inputs, measure):
        raise NotImplementedError("on Sundays")

    rows = run(compile_)
    assert [row.left_out for row in rows] == ["cannot serve this: on Sundays"] * 2
    assert capsys.readouterr().out.count("on Sundays") == 1


def test_a_case_that_needs_too_much_memory_is_left_out():
    rows = run(lambda inputs, measure: taking(2 * 10**9))
    assert rows[0].left_out == "needs more than half of the memory"


def test_a_case_has_a_longest_input():
    rows = run(lambda inputs, measure: taking(1), max_length=8)
    assert [row.left_out for row in rows] == [None, "not measured beyond 8 tokens"]


def test_cases_are_chosen_by_pattern():
    cases = [Case(CaseInfo(name, name), lambda *_: taking(1)) for name in ("a/x", "a/y", "b/x")]
    chosen = suite.select(cases, ["*/x", "a/x"])
    assert [case.info.name for case in chosen] == ["a/x", "b/x"]
    assert suite.select(cases, []) == tuple(cases)
    with pytest.raises(ValueError, match="No case matches 'c'"):
        suite.select(cases, ["c"])


def test_decoding_is_measured_for_each_past_and_batch(monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 3)
    monkeypatch.setattr(decode, "SCANNED", 4)
    rows = decode.measure_decoding(SHAPE, (2,), (0, 5), (4,), LIMITS)
    found = {(row.case, row.setting.batch, row.setting.length) for row in rows}
    ours = {(f"decode/{c}", 2, past) for c in ("scan", "call") for past in (0, 5)}
    assert found == ours | {("decode/kv-cache", 2, 4)}
    assert all(len(row.samples) == 3 and row.samples[0] > 0 for row in rows)
