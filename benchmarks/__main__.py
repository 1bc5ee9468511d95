"""Measures attention: ``python -m benchmarks`` (``--quick`` for a look in under two minutes).

Writes ``results.json`` (every sample), ``table.md`` and pictures into ``--output``. On a CPU the
process keeps to one core, the first it may use (``taskset -c 1 python -m benchmarks`` takes another
one); on an accelerator larger shapes in bfloat16 are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environment
from benchmarks.settings import Setting


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is measured unless options say otherwise.

    Attributes:
      lengths: T.
      heads: H.
      head_dims: D, one after the other.
      dtype: of the inputs.
      repeats: samples of a program.
      seconds: for the samples of a program.
      batches: sequences decoded at once.
      pasts: tokens before a decoding step.
      cached: tokens in the cache of exact attention's step.
    """

    lengths: tuple[int, ...]
    heads: int
    head_dims: tuple[int, ...]
    dtype: str
    repeats: int
    seconds: float
    batches: tuple[int, ...]
    pasts: tuple[int, ...]
    cached: tuple[int, ...]


CPU = Preset(
    lengths=tuple(2**n for n in range(9, 15)),
    heads=8,
    head_dims=(64,),
    dtype="float32",
    repeats=7,
    seconds=60.0,
    batches=(1, 8),
    pasts=(0, 100_000),
    cached=(1024, 8192),
)
GPU = dataclasses.replace(
    CPU,
    lengths=tuple(2**n for n in range(10, 19)),
    heads=64,
    head_dims=(64, 128),
    dtype="bfloat16",
)
QUICK = {
    "head_dims": (64,),
    "repeats": 3,
    "seconds": 3.0,
    "batches": (1,),
    "pasts": (0, 4096),
    "cached": (1024,),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    platform = environment.detect_platform()
    preset = CPU if platform == "cpu" else GPU
    if "--quick" in arguments:
        lengths = (512, 4096) if platform == "cpu" else (1024, 16384)
        preset = dataclasses.replace(preset, lengths=lengths, **QUICK)
    options = _parser(preset).parse_args(arguments)
    environment.prepare(platform, all_cores=options.all_cores)
    run(options, preset, platform, "python -m benchmarks " + shlex.join(arguments))


def run(options: argparse.Namespace, preset: Preset, platform: str, command: str) -> None:
    """Measures, and writes results, tables and pictures."""
    # These import jax, which must not happen before the process is pinned to a core.
    from benchmarks import cases, decode, report, suite
    from benchmarks.results import DECODE, Results
    from benchmarks.timing import Clock, Effort

    limits = suite.Limits(
        Clock(wall=platform != "cpu"),
        Effort(options.repeats, options.seconds),
        environment.memory_limit(),
    )
    chosen = suite.select(cases.attention_cases(platform), options.only)
    rows = []
    for head_dim in options.head_dims:
        shape = Setting(
            batch=options.batch,
            heads=options.heads,
            head_dim=head_dim,
            features=options.features,
            dtype=options.dtype,
        )
        measures = [measure for measure in options.measures if measure != DECODE]
        rows += suite.measure_lengths(chosen, shape, options.lengths, measures, limits)
        if DECODE in options.measures and not options.only:
            rows += decode.measure_decoding(
                shape, preset.batches, preset.pasts, preset.cached, limits
            )
    results = Results(
        machine=environment.describe_machine(platform, command.strip()),
        cases=(*(case.info for case in chosen), *decode.DECODE_CASES),
        rows=tuple(rows),
    )
    results.save(options.output / report.RESULTS)
    print(report.ratios(results) + f"All samples, tables and pictures: {options.output}")
    report.write_page([results], options.output / "table.md", options.output, str(options.output))


def _parser(preset: Preset) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of attention, for this package and baselines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two lengths, three samples: under two minutes")
    add("--lengths", "--length", type=_numbers, default=preset.lengths, help="as in 512,4096")
    add("--batch", type=int, default=1, help="B")
    add("--heads", type=int, default=preset.heads, help="H")
    add("--head_dims", "--head_dim", type=_numbers, default=preset.head_dims, help="D, one or more")
    add("--features", type=int, default=256, help="M")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=preset.dtype, help="inputs")
    add("--measures", type=_words, default=("forward", "f+b", "decode"), help="what is measured")
    add("--only", type=_words, default=(), help="patterns of cases, as in 'causal/*,floor'")
    add("--repeats", type=int, default=preset.repeats, help="samples of each program")
    add("--seconds", type=float, default=preset.seconds, help="for the samples of a program")
    add("--all_cores", action="store_true", help="do not pin the process to one core")
    add("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
