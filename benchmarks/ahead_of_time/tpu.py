"""Estimates attention on TPUs without one: ``python -m benchmarks.ahead_of_time.tpu``.

libtpu compiles the program for a topology and estimates the cycles of each operation from its final
instructions (its static profile, Pallas kernels included). Each program is compiled in a process of
its own, because libtpu ends the process where its profiler meets an instruction that it does not
know. Needs ``pip install "fast-attention[tpu]"`` and Python 3.12 or later.

These are estimates by the compiler, not measurements: compare variants, not milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.programs import BACKWARD, FORWARD


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: clock in GHz, bfloat16 flop/s, bytes/s of its memory."""

    topology: str
    clock: float
    flops: float
    bandwidth: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.503, 197e12, 819e9),
    "v5p": Chip("v5p:2x2x1", 1.75, 459e12, 2765e9),
    "v6e": Chip("v6e:2x2", 1.75, 918e12, 1640e9),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled: attention of ``[batch, length, heads, width]``, M = features.

    ``chunk`` is None for that of the package, else positions handled at once; with ``decay`` the
    call has ``log_decay [batch, length, heads]``.
    """

    chip: str
    causal: bool
    measure: str
    batch: int = 8
    length: int = 4096
    heads: int = 8
    width: int = 64
    features: int = 256
    dtype: str = "bfloat16"
    implementation: str | None = None
    chunk: int | None = None
    decay: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says; milliseconds are None where its profiler failed.

    Attributes:
      milliseconds: estimated.
      roofline: the larger of flops over peak and bytes over bandwidth, in milliseconds.
      temporaries: memory beside inputs and results, in arrays of the query's size.
    """

    milliseconds: float | None
    roofline: float
    temporaries: float


def roofline(case: Case) -> float:
    """Returns the least milliseconds: products of chunks of 128 of which half is seen."""
    chip, m, d, seen = CHIPS[case.chip], case.features, case.width, 64
    flops = 8 * d * m + (2 * (m + d) * seen if case.causal else 0)
    arrays = 4
    if case.measure == BACKWARD:
        flops += 16 * d * m + ((6 * m + 4 * d) * seen if case.causal else 0)
        arrays = 12
    rows = case.batch * case.length * case.heads
    size = 2 if case.dtype == "bfloat16" else 4
    return 1e3 * rows * max(flops / chip.flops, arrays * d * size / chip.bandwidth)


def estimate(case: Case, timeout: float = 3000) -> Estimate:
    """Compiles a case in a process of its own.

    Raises:
      RuntimeError: if it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}/profile"
        done = _child(case, folder, flags, timeout)
        profiled = done.returncode == 0
        if not profiled:
            done = _child(case, folder, "", timeout)
        if done.returncode:
            raise RuntimeError(f"{case} does not compile:\n{done.stderr[-2000:]}")
        program = Path(folder, "program.txt").read_text(encoding="utf-8")
        temporaries = json.loads(Path(folder, "memory.json").read_text(encoding="utf-8"))
        cycles = _profile(Path(folder, "profile")) if profiled else {}
        total = _cycles(program, cycles)
    size = case.batch * case.length * case.heads * case.width
    size *= 2 if case.dtype == "bfloat16" else 4
    # A kernel without cycles is one that the profiler gave up.
    kernels = re.findall(r"%(\S+) = \S.* custom-call\(.*tpu_custom_call", program)
    known = profiled and all(cycles.get(name) for name in kernels)
    milliseconds = total / CHIPS[case.chip].clock / 1e6 if known else None
    return Estimate(milliseconds, roofline(case), temporaries / size)


def _child(case: Case, folder: str, flags: str, timeout: float) -> subprocess.CompletedProcess:
    settings = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": flags,
        "TPU_SKIP_MDS_QUERY": "1",
    }
    command = [sys.executable, "-m", "benchmarks.ahead_of_time.tpu", "--child", folder]
    return subprocess.run(
        [*command, json.dumps(dataclasses.asdict(case))],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def compile_case(case: Case) -> Any:
    """Returns the program, compiled for one device of the topology."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import fast_attention

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[case.chip].topology)
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    attend = fast_attention.make_fast_softmax_attention(
        case.width,
        nb_features=case.features,
        unidirectional=case.causal,
        redraw_features=False,
        implementation=case.implementation,
        chunk_size=case.chunk,
    )

    def run(query, key, value, log_decay=None):
        return attend(query, key, value, log_decay=log_decay)

    def both(*arrays):
        numbers = tuple(range(len(arrays)))
        return jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), argnums=numbers)(*arrays)

    shape = (case.batch, case.length, case.heads, case.width)
    like = jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))
    arrays = [like] * 3
    if case.decay:
        arrays.append(jax.ShapeDtypeStruct(shape[:-1], jnp.float32))
    function = run if case.measure == FORWARD else both
    jitted = jax.jit(function, in_shardings=place, out_shardings=place)
    return jitted.lower(*arrays).compile()


def _write_program(case: Case, folder: str) -> None:
    program = compile_case(case)
    Path(folder, "program.txt").write_text(program.as_text(), encoding="utf-8")
    size = program.memory_analysis().temp_size_in_bytes
    Path(folder, "memory.json").write_text(json.dumps(size), encoding="utf-8")


def _profile(folder: Path) -> dict[str, int]:
    """Returns cycles of operations by name."""
    found = {}
    for path in folder.glob("*.textproto"):
        for block in path.read_text(encoding="utf-8").split("hlo_op_estimate")[1:]:
            name = re.search(r'hlo_op_name: "(.*)"', block)
            cycles = re.search(r"estimated_cycles: (\d+)", block)
            if name:
                found[name.group(1)] = int(cycles.group(1)) if cycles else 0
    return found


def _cycles(program: str, profile: dict[str, int]) -> int:
    """Adds the cycles of all operations, those of loops times their trips.

    For operations that the profile lacks, the estimate of XLA's cost model is added. Branches of
    conditionals are not counted: they are for rare values.
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start and not line.startswith(" "):
            lines = bodies.setdefault(start.group(2), [])
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith(" "):
            lines.append(line)

    def total(body: str) -> int:
        result = 0
        for line in bodies.get(body, []):
            name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line)
            if not name:
                continue
            guess = re.search(r'estimated_cycles"?:"?(\d+)', line)
            result += profile.get(name.group(1), int(guess.group(1)) if guess else 0)
            loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
            if loop:
                result += total(loop.group(1)) * rounds(line)
        return result

    def rounds(line: str) -> int:
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
        if known:
            return int(known.group(1))
        # Else what the condition compares the counter with, if it has one.
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        lines = bodies.get(condition.group(1), []) if condition else []
        limits = [re.search(r"s32\[\]\S* constant\((\d+)\)", x) for x in lines]
        return max([1, *(int(x.group(1)) for x in limits if x)])

    return total(entry)


def table(results: list[tuple[Case, Estimate]]) -> str:
    """Returns a table in Markdown."""
    rows = ["| chip | attention | pass | estimate, ms | roofline, ms | ratio | temporaries |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    for case, found in results:
        ms = found.milliseconds
        rows.append(
            f"| {case.chip} | {'causal' if case.causal else 'bidirectional'} | {case.measure} | "
            f"{'profiler failed' if ms is None else f'{ms:.2f}'} | {found.roofline:.2f} | "
            f"{'' if ms is None else f'{ms / found.roofline:.1f}'} | {found.temporaries:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--measures", nargs="+", choices=(FORWARD, BACKWARD), default=None)
    parser.add_argument("--implementation", help="by default what serves a program for a TPU")
    parser.add_argument("--chunks", nargs="+", type=int, default=[None], help="chunk sizes to try")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--decay", action="store_true", help="causal attention, with log_decay")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, case = options.child
        _write_program(Case(**json.loads(case)), folder)
        return
    results = []
    measures = options.measures or (FORWARD, BACKWARD)
    directions = (True,) if options.decay else (True, False)
    choices = itertools.product(options.chips, measures, directions, options.chunks)
    for chip, measure, causal, chunk in choices:
        case = Case(
            chip,
            causal,
            measure,
            length=options.length,
            width=options.width,
            features=options.features,
            implementation=options.implementation,
            chunk=chunk,
            decay=options.decay,
        )
        results.append((case, estimate(case)))
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
