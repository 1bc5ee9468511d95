"""Results as Markdown tables: targets, then ratios, then times, memory and decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from benchmarks.crossover import crossover
from benchmarks.programs import MEASURES
from benchmarks.results import DECODE, CaseInfo, Results, Row
from benchmarks.settings import Setting
from benchmarks.targets import TARGETS, Target
from benchmarks.timing import spread


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float) -> str:
    """Returns three significant digits, and all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine_table(results: Results) -> str:
    """Returns where, when and how the figures were taken."""
    return table(["", "run"], ([name, f"`{value}`"] for name, value in results.machine.items()))


def targets_table(results: Results, targets: Sequence[Target] = TARGETS) -> str:
    """Returns what was aimed at, what was measured, and whether that is met."""
    rows = []
    for target in targets:
        sign = ">=" if target.at_least is not None else "<="
        value = target.value(results)
        measured, verdict = "-", "not measured"
        if value is not None:
            measured = f"{number(value)} {target.unit}".strip()
            miss = target.missed_by(value)
            verdict = f"missed by {miss:.0%}" if miss else "met"
        rows.append(
            [target.name, f"{sign} {target.bound:g} {target.unit}".strip(), measured, verdict]
        )
    return table(["", "target", "measured", ""], rows)


def best_times(results: Results, kind: str, measure: str, shape: Setting) -> dict[int, float]:
    """Returns the time of our fastest FAVOR+ implementation by length."""
    best: dict[int, float] = {}
    for row in results.of(measure, shape):
        if row.case.startswith(f"{kind}/favor-") and row.seconds is not None:
            best[row.setting.length] = min(row.seconds, best.get(row.setting.length, row.seconds))
    return best


def ratio_table(results: Results, kind: str, measure: str, shape: Setting) -> str:
    """Returns how many times longer each case takes than our fastest FAVOR+."""
    best = best_times(results, kind, measure, shape)

    def ratio(row: Row) -> str:
        ours = best.get(row.setting.length)
        return "-" if row.seconds is None or not ours else number(row.seconds / ours)

    return _by_length(results, kind, measure, shape, ratio)


def time_table(results: Results, kind: str, measure: str, shape: Setting) -> str:
    """Returns medians in milliseconds, with the interquartile range in per cent of them."""

    def time(row: Row) -> str:
        if row.seconds is None:
            return "-"
        return f"{number(row.seconds * 1e3)} ({spread(row.samples) or 0:.0%})"

    return _by_length(results, kind, measure, shape, time)


def memory_table(results: Results, kind: str, measure: str, shape: Setting) -> str:
    """Returns temporaries and results in MiB, as the compiler planned them."""
    return _by_length(
        results,
        kind,
        measure,
        shape,
        lambda row: "-" if row.memory is None else number(row.memory / 2**20),
    )


def decode_table(results: Results) -> str:
    """Returns microseconds per token after different numbers of tokens; empty if not measured."""
    rows = [row for row in results.rows if row.measure == DECODE]
    if not rows:
        return ""
    pasts = sorted({row.setting.length for row in rows})
    lines = []
    for info in results.cases:
        for setting in dict.fromkeys(
            dataclasses.replace(row.setting, length=0) for row in rows if row.case == info.name
        ):
            found = [
                results.row(info.name, DECODE, dataclasses.replace(setting, length=past))
                for past in pasts
            ]
            cells = ["-" if r is None or r.seconds is None else _micro(r) for r in found]
            lines.append([f"{info.label}, B={setting.batch}, D={setting.head_dim}", *cells])
    return table(["tokens before", *(f"{past:,}" for past in pasts)], lines)


def crossovers(results: Results, kind: str, shape: Setting) -> str:
    """Returns a list of the lengths from which our fastest FAVOR+ beats exact attention."""
    lines = []
    for info in _cases(results, kind):
        if info.name.partition("/")[2] not in ("exact", "torch-sdpa"):
            continue
        for measure in MEASURES:
            exact = {
                row.setting.length: row.seconds
                for row in results.of(measure, shape)
                if row.case == info.name and row.seconds is not None
            }
            known, length = crossover(best_times(results, kind, measure, shape), exact)
            said = {
                "at": f"from about {length:,.0f} tokens on" if length else "",
                "below": f"at every length measured, {length} and more",
                "above": f"not up to {length} tokens",
                "unknown": "not measured",
            }
            lines.append(f"- faster than {info.label}, {measure}: {said[known]}")
    return "\n".join(lines) + "\n"


def left_out(results: Results) -> str:
    """Returns a list of what was left out and why, each reason once."""
    labels = {info.name: f"{info.attention or ''} {info.label}".strip() for info in results.cases}
    first: dict[tuple[str, str, str], int] = {}
    for row in results.rows:
        if row.left_out is not None:
            key = (labels[row.case], row.measure, row.left_out)
            first[key] = min(row.setting.length, first.get(key, row.setting.length))
    return "".join(
        f"- {label}, {measure}, from {length} tokens: {reason}\n"
        for (label, measure, reason), length in first.items()
    )


def _micro(row: Row) -> str:
    assert row.seconds is not None
    return f"{number(row.seconds * 1e6)} us"


def _cases(results: Results, kind: str) -> list[CaseInfo]:
    return [info for info in results.cases if info.attention in (kind, None)]


def _by_length(
    results: Results, kind: str, measure: str, shape: Setting, show: Callable[[Row], str]
) -> str:
    lengths = results.lengths(measure, shape)
    lines = []
    for info in _cases(results, kind):
        rows = {r.setting.length: r for r in results.of(measure, shape) if r.case == info.name}
        cells = [show(rows[length]) if length in rows else "-" for length in lengths]
        if set(cells) - {"-"}:
            label = f"**{info.label}**" if info.ours else info.label
            lines.append([label, *cells])
    return table(["tokens", *(f"{length:,}" for length in lengths)], lines)
