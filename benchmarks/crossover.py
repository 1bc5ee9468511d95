"""The length from which linear attention is faster than exact attention."""

from __future__ import annotations

import math
from collections.abc import Mapping


def crossover(ours: Mapping[int, float], exact: Mapping[int, float]) -> tuple[str, float | None]:
    """Finds where two curves of time against length cross, straight lines in log-log.

    Args:
      ours: seconds by length.
      exact: seconds by length; often of fewer lengths.

    Returns:
      What is known, ``at``, ``below`` (faster at every length) or ``above`` (at none), and the
      length it refers to; ``unknown`` and None without a common length.
    """
    lengths = sorted(ours.keys() & exact.keys())
    if not lengths:
        return "unknown", None
    gains = [math.log(exact[n] / ours[n]) for n in lengths]
    if gains[-1] < 0:
        return "above", lengths[-1]
    slower = [i for i, gain in enumerate(gains) if gain < 0]
    if not slower:
        return "below", lengths[0]
    i = slower[-1]
    part = -gains[i] / (gains[i + 1] - gains[i])
    logs = math.log(lengths[i]), math.log(lengths[i + 1])
    return "at", math.exp(logs[0] + part * (logs[1] - logs[0]))
