"""What a run leaves behind: every sample, with what was measured and where. Plain JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.settings import Setting
from benchmarks.timing import median

DECODE = "decode"
"""The measure of a decoding step: seconds per token after ``length`` tokens."""


@dataclasses.dataclass(frozen=True)
class CaseInfo:
    """Names of a case.

    Attributes:
      name: unique; what options and targets call it.
      label: for tables and pictures.
      attention: ``causal`` or ``bidirectional``; None if it is the same for both.
      ours: it is of this package, not a baseline.
    """

    name: str
    label: str
    attention: str | None = None
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One case at one shape and measure.

    Attributes:
      case: its name.
      measure: ``forward``, ``f+b`` or ``decode``.
      setting: the shape; of decoding, the length is the number of tokens before.
      samples: seconds per call, or per token; none if it was left out.
      memory: bytes of temporaries and results, where known.
      left_out: why there are no samples.
    """

    case: str
    measure: str
    setting: Setting
    samples: tuple[float, ...] = ()
    memory: int | None = None
    left_out: str | None = None

    @property
    def seconds(self) -> float | None:
        """The median."""
        return median(self.samples)


@dataclasses.dataclass(frozen=True)
class Results:
    """One run on one machine."""

    machine: Mapping[str, str | int]
    cases: tuple[CaseInfo, ...]
    rows: tuple[Row, ...]

    def shapes(self) -> tuple[Setting, ...]:
        """Returns the shapes of the attention measures, whatever the length, in their order."""
        rows = [row for row in self.rows if row.measure != DECODE]
        return tuple(dict.fromkeys(dataclasses.replace(row.setting, length=0) for row in rows))

    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of attention that cases were measured of, causal first."""
        found = {info.attention for info in self.cases}
        return tuple(kind for kind in ("causal", "bidirectional") if kind in found)

    def lengths(self, measure: str, shape: Setting) -> tuple[int, ...]:
        """Returns the lengths at which a measure was taken of a shape, ascending."""
        return tuple(sorted({row.setting.length for row in self.of(measure, shape)}))

    def of(self, measure: str, shape: Setting) -> tuple[Row, ...]:
        """Returns the rows of one measure and shape, of any length."""
        return tuple(
            row
            for row in self.rows
            if row.measure == measure
            and dataclasses.replace(row.setting, length=0) == dataclasses.replace(shape, length=0)
        )

    def row(self, case: str, measure: str, setting: Setting) -> Row | None:
        """Returns one row, or None if it was not asked for."""
        for row in self.rows:
            if (row.case, row.measure, row.setting) == (case, measure, setting):
                return row
        return None

    def save(self, path: Path) -> None:
        """Writes the results as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads what :meth:`save` wrote."""
        data = json.loads(path.read_text())
        return cls(
            machine=data["machine"],
            cases=tuple(CaseInfo(**case) for case in data["cases"]),
            rows=tuple(_row(**row) for row in data["rows"]),
        )


def _row(setting: dict, samples: list[float], **rest) -> Row:
    return Row(setting=Setting(**setting), samples=tuple(samples), **rest)
