"""Measures which chunk is best, and writes the table that the package takes it from.

``python -m benchmarks.chunk_sizes`` measures the output and gradients of causal and bidirectional
FAVOR+ on the present device and rewrites the rows of its kind (``cpu``, ``TPU v5e``, ``NVIDIA H100
80GB HBM3``) in ``fast_attention/linear/chunked/chunk_table.py``; the rows of others stay.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import environment
from benchmarks.settings import Setting

TABLE = Path(__file__).parents[1] / "fast_attention" / "linear" / "chunked" / "chunk_table.py"

# D, M, H: the widths of common models, with a like amount of work.
SHAPES = {
    "cpu": ((64, 64, 8), (64, 128, 8), (64, 256, 8), (128, 256, 4)),
    "gpu": ((64, 64, 64), (64, 128, 64), (64, 256, 64), (128, 256, 32)),
}
CHUNKS = {"cpu": (32, 64, 128, 256), "gpu": (64, 128, 256, 512, 1024)}
UNROLLS = (1, 2)
LENGTH = {"cpu": 2048, "gpu": 16384}

TIE = 0.015
"""Differences up to this part cannot be told from noise."""

UNROLLING = 1.05
"""Unrolled loops must gain this factor: they take longer to compile."""

Candidate = tuple[int, int]
"""Chunk and unroll."""

Table = dict[tuple[str, bool, int, int], tuple[int, int, str]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and rewrites the table."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chunk_sizes", description="Finds the best chunk sizes."
    )
    parser.add_argument("--repeats", type=int, default=7, help="samples of each (7)")
    parser.add_argument("--length", type=int, help="tokens (2048 on a CPU, 16384 on a GPU)")
    parser.add_argument("--table", type=Path, default=TABLE, help="file to rewrite")
    options = parser.parse_args(arguments)
    platform = environment.detect_platform()
    environment.prepare(platform)
    from fast_attention.linear.devices import device_of_process, usual_name

    kind = "cpu" if platform == "cpu" else "gpu"
    device = usual_name(device_of_process())
    found: Table = {}
    for causal in (True, False):
        for head_dim, features, heads in SHAPES[kind]:
            shape = Setting(
                length=options.length or LENGTH[kind],
                heads=heads,
                head_dim=head_dim,
                features=features,
                dtype="float32" if kind == "cpu" else "bfloat16",
            )
            times = measure(shape, causal, CHUNKS[kind], options.repeats, wall=kind != "cpu")
            _show(shape, causal, times)
            found[device, causal, head_dim, features] = (*best(times), "measured")
    machine = environment.describe_machine(platform, "")
    name = machine["cpu"] if platform == "cpu" else machine["device"]
    origin = (
        shlex.join(["python", "-m", "benchmarks.chunk_sizes", *arguments]),
        f"{name}, {machine['cores']} core(s), jax {machine['jax']}",
        str(machine["date"]),
    )
    rewrite(options.table, device, found, origin)
    print(f"Wrote the rows of {device} into {options.table}.")


def measure(
    shape: Setting, causal: bool, chunks: Sequence[int], repeats: int, *, wall: bool
) -> dict[Candidate, float]:
    """Returns the median seconds of output and gradients by chunk and unroll.

    Args:
      shape: one shape.
      causal: causal or bidirectional.
      chunks: chunk sizes to try, each with every unroll; those beyond the length are skipped.
      repeats: samples of each.
      wall: time on the wall instead of processor time.
    """
    from benchmarks.programs import BACKWARD, compile_jax
    from benchmarks.settings import make_inputs
    from benchmarks.timing import Clock, Effort, interleave, median
    from fast_attention.feature_maps import PositiveFeatures
    from fast_attention.linear import Plan, linear_attention

    inputs = make_inputs(shape)
    feature_map = PositiveFeatures(shape.features)

    def compile_candidate(chunk: int, unroll: int):
        def function(q, k, v):
            return linear_attention(
                q,
                k,
                v,
                Plan(
                    feature_map,
                    causal=causal,
                    chunk_size=chunk,
                    unroll=unroll,
                    implementation="chunked",
                ),
                parameters=inputs.projection,
            )

        return compile_jax(function, inputs.qkv, inputs, BACKWARD)

    candidates = [(c, u) for c in chunks if c <= shape.length for u in UNROLLS]
    programs = {str(candidate): compile_candidate(*candidate) for candidate in candidates}
    samples = interleave(programs, Clock(wall=wall), Effort(repeats, seconds=600.0))
    times = {candidate: median(samples[str(candidate)]) for candidate in candidates}
    return {candidate: seconds for candidate, seconds in times.items() if seconds is not None}


def best(times: Mapping[Candidate, float]) -> Candidate:
    """Returns the simplest candidate that is as fast as any.

    Of those within :data:`TIE` of the fastest, the smallest chunk is taken, as it needs less
    memory; candidates with more unrolling count as slower by :data:`UNROLLING`.
    """
    costs = {c: seconds * (UNROLLING if c[1] > 1 else 1) for c, seconds in times.items()}
    limit = (1 + TIE) * min(costs.values())
    return min(candidate for candidate, cost in costs.items() if cost <= limit)


def rewrite(path: Path, device: str, found: Table, origin: tuple[str, str, str]) -> None:
    """Replaces the rows of one kind of device in the table and keeps the others.

    Args:
      path: the table, a Python file.
      device: whose rows are replaced, all of them.
      found: the new rows, measured.
      origin: command, machine and date.
    """
    old: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), old)
    chunks = {row: choice for row, choice in old["CHUNKS"].items() if row[0] != device}
    chunks.update(found)
    origins = {row: told for row, told in old["ORIGINS"].items() if row[0] != device}
    origins[device, "measured"] = origin
    lines = [f'"""{old["__doc__"]}"""', "", "CHUNKS = {"]
    for (name, *shape), (chunk, unroll, how) in sorted(chunks.items()):
        row = ", ".join([_quoted(name), *map(str, shape)])
        lines.append(f"    ({row}): ({chunk}, {unroll}, {_quoted(how)}),")
    lines += ["}", "", "ORIGINS = {"]
    for key, told in sorted(origins.items()):
        lines.append(f"    ({', '.join(map(_quoted, key))}): (")
        lines += [*(f"        {_quoted(part)}," for part in told), "    ),"]
    path.write_text("\n".join([*lines, "}", ""]))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _show(shape: Setting, causal: bool, times: Mapping[Candidate, float]) -> None:
    fastest = min(times.values())
    kind = "causal" if causal else "bidirectional"
    print(f"{kind}, H={shape.heads} D={shape.head_dim} M={shape.features}")
    for (chunk, unroll), seconds in times.items():
        print(f"  chunk {chunk:5d}  unroll {unroll}  {seconds * 1e3:9.2f} ms", end="")
        print("  best" if seconds == fastest else f"  +{seconds / fastest - 1:.0%}")


if __name__ == "__main__":
    main()
