"""Counts the kernels that a program compiled for a GPU launches, in its scheduled HLO."""

from __future__ import annotations

import collections
import re

# Instructions that move no data: names, views and parts of others.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "copy-done",
    "fusion-done",
    "async-done",
    "opt-barrier",
    "add-dependency",
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


def count_launches(text: str) -> collections.Counter[str]:
    """Returns the launches of each kind of instruction.

    A loop counts as often as its known trip count says. One without, as the loops for rare values,
    counts as its condition alone (``while?``): its body usually makes no round. Branches of a
    conditional count as the dearest one.

    Args:
      text: of a compiled program (``compiled.as_text()``), whose HLO is scheduled.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)

    def walk(name: str) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for line in computations[name]:
            found = _INSTRUCTION.match(line)
            if not found or found[2] in FREE:
                continue
            kind = found[2]
            if kind == "while":
                trips = _TRIPS.search(line)
                if trips is None:
                    total["while?"] += 1 + walk(_called(line, "condition")).total()
                else:
                    for inner, count in walk(_called(line, "body")).items():
                        total[inner] += count * int(trips[1])
            elif kind == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", line)
                names = (
                    [x.strip().lstrip("%") for x in branches[1].split(",")]
                    if branches
                    else [_called(line, "true_computation"), _called(line, "false_computation")]
                )
                total += max(map(walk, names), key=lambda counts: counts.total())
            elif kind == "call":
                total += walk(_called(line, "to_apply"))
            else:
                target = re.search(r'custom_call_target="([^"]+)"', line)
                total[target[1] if target else kind] += 1
        return total

    return walk(entry)


def _called(line: str, role: str) -> str:
    found = re.search(role + r"=%?([\w.\-]+)", line)
    assert found is not None, line
    return found[1]
