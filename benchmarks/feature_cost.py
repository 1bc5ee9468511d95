"""Cost of features tuned to data, beside plain positive ones of the same number.

    taskset -c 0 python -m benchmarks.feature_cost

Each row is a feature map, each column its time over that of ``favor+`` with ``orthogonal`` rows:
the median of the ratios within a round, in which all of them take turns. Stored parameters are
calibrated beforehand; causal attention can have no others.

Shape letters: T length, M features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.programs import FORWARD, MEASURES, Program, jitted
from benchmarks.settings import Inputs, Setting, make_inputs
from benchmarks.timing import Clock, Effort, interleave, median
from fast_attention import FastAttention, make_fast_softmax_attention
from fast_attention.mechanisms.favor.calibration import calibrate

BASE = ("favor+", "orthogonal", "")
CASES: tuple[tuple[str, str, str], ...] = (
    BASE,
    ("favor+", "orthogonal_antithetic", ""),
    ("centred_favor++", "orthogonal", "stored"),
    ("wderf_s", "orthogonal", "stored"),
    ("wderf_s", "orthogonal_antithetic", "stored"),
    ("wderf_s", "orthogonal", "call"),
    ("wderf_s", "orthogonal_antithetic", "call"),
)
"""Estimator, coupling of rows, and where parameters come from."""


def programs(inputs: Inputs, causal: bool) -> dict[str, Program]:
    """Compiles every case that there is, forward and with gradients, by name."""
    compiled = {}
    for case in CASES:
        estimator, coupling, source = case
        if causal and source == "call":
            continue
        function = make_fast_softmax_attention(
            nb_features=inputs.setting.features,
            estimator=estimator,
            projection=coupling,
            calibration=source or None,  # pyright: ignore[reportArgumentType]
            unidirectional=causal,
        )
        held = function.draw_projection(jax.random.key(0), inputs.setting.head_dim)
        if source == "stored":
            held = calibrate(function, *inputs.qkv[:2], projection=held)
        for measure in MEASURES:
            compiled[_name(case, measure)] = _program(function, inputs, held, measure)
    return compiled


def ratios(samples: dict[str, tuple[float, ...]], case: tuple[str, str, str]) -> list[float]:
    """Returns the median ratio of a case to the base, forward and with gradients."""
    found = []
    for measure in MEASURES:
        pairs = zip(samples[_name(case, measure)], samples[_name(BASE, measure)], strict=False)
        found.append(median([own / base for own, base in pairs]) or float("nan"))
    return found


def _program(function: FastAttention, inputs: Inputs, held: Any, measure: str) -> Program:
    """Compiles a call with what a layer would hold, which is an argument: layers change it."""

    def forward(held, query, key, value):
        return function(query, key, value, projection=held)

    def both(held, cotangent, *qkv):
        out, pull_back = jax.vjp(lambda *qkv: forward(held, *qkv), *qkv)
        return out, *pull_back(cotangent)

    if measure == FORWARD:
        return jitted(forward, held, *inputs.qkv)
    return jitted(both, held, inputs.cotangent, *inputs.qkv)


def _name(case: Sequence[str], measure: str) -> str:
    return " ".join((*case, measure))


def main() -> None:
    """Prints one table a length, causal or not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feature_cost",
        description="Cost of features tuned to data, over that of plain positive ones.",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens")
    parser.add_argument("--features", type=int, default=256, help="M (256)")
    parser.add_argument("--repeats", type=int, default=11, help="rounds (11)")
    parser.add_argument("--causal", action="store_true", help="causal attention")
    options = parser.parse_args()
    for length in options.lengths:
        inputs = make_inputs(Setting(length=length, features=options.features))
        compiled = programs(inputs, options.causal)
        samples = interleave(compiled, Clock(), Effort(repeats=options.repeats))
        times = [1e3 * (median(samples[_name(BASE, m)]) or float("nan")) for m in MEASURES]
        kind = "causal" if options.causal else "bidirectional"
        print(
            f"\nT = {length}, M = {options.features}, {kind}; "
            f"favor+ takes {times[0]:.0f} ms forward and {times[1]:.0f} ms with gradients.\n"
        )
        print("| estimator | coupling | parameters | forward | f+b |")
        print("|---|---|---|---|---|")
        for case in CASES:
            if _name(case, MEASURES[0]) in samples:
                figures = " | ".join(f"{x:.2f}" for x in ratios(samples, case))
                print(f"| {' | '.join(case)} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
