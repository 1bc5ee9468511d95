"""Time of each kind of operation in a call on a CPU: ``python -m benchmarks.operations``.

JAX's profiler records when each operation of a compiled program runs, and the text of the program
shows what each operation computes. The table adds the times of operations of the same kind. Large
products are counted by themselves, because the floor of :mod:`benchmarks.targets` is four of them.

The process uses one core, like those of the other benchmarks.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.settings import Setting, make_inputs

KINDS = (
    "large products",
    "small products",
    "sums of rows",
    "exponentials",
    "logarithms",
    "maxima and sums",
    "copies",
    "buffers filled",
    "other arithmetic",
)
"""Rows of the table. Sums of rows are products with a vector."""

LARGE = 0.5
"""A large product has at least this part of the operations of the largest one."""

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<type>\([^=]*?\)|\S+) (?P<opcode>[\w\-]+)\("
    r"(?P<operands>[^)]*)\)(?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
_MOVES = frozenset(
    [
        "parameter",
        "constant",
        "iota",
        "bitcast",
        "copy",
        "transpose",
        "reshape",
        "slice",
        "dynamic-slice",
        "dynamic-update-slice",
        "concatenate",
        "pad",
        "reverse",
        "gather",
        "tuple",
        "get-tuple-element",
    ]
)
_NESTED = frozenset(["while", "conditional", "call"])


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one operation of a program computes.

    Attributes:
      kind: one of :data:`KINDS`; products are "products" until their sizes are compared.
      flops: of products, multiplications and additions of one run.
    """

    kind: str
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class Share:
    """Time of all operations of one kind in a call.

    Attributes:
      seconds: in a call.
      operations: different ones in the program.
      flops: of products in a call.
    """

    seconds: float
    operations: int
    flops: int


def read_operations(text: str) -> dict[str, Operation]:
    """Reads what the operations of a compiled program compute.

    Args:
      text: of the program, as from ``compiled.as_text()``.

    Returns:
      Operations by name. Loops, branches and calls, whose time is that of what is inside, are left
      out.
    """
    computations: dict[str, list[re.Match[str]]] = {}
    body: list[re.Match[str]] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            body = computations.setdefault(start["name"], [])
        elif instruction := _INSTRUCTION.match(line):
            body.append(instruction)
    return {
        instruction["name"]: _operation(instruction, instructions, computations)
        for instructions in computations.values()
        for instruction in instructions
        if instruction["opcode"] not in _NESTED
    }


def _operation(
    instruction: re.Match[str],
    around: Sequence[re.Match[str]],
    computations: Mapping[str, Sequence[re.Match[str]]],
) -> Operation:
    """Classifies an operation, by what its computation contains if it is a fusion."""
    called = re.search(r"calls=%([\w.\-]+)", instruction["rest"])
    inside = computations.get(called[1], ()) if called else ()
    opcodes = [i["opcode"] for i in (inside or (instruction,))]
    if "dot" in opcodes:
        dots = [i for i in (inside or (instruction,)) if i["opcode"] == "dot"]
        sizes = [_product_size(dot, inside or around) for dot in dots]
        vector = all(vector for _, vector in sizes)
        return Operation("sums of rows" if vector else "products", sum(n for n, _ in sizes))
    # An exponential is the dearest of what is fused with it.
    if "exponential" in opcodes:
        return Operation("exponentials")
    if "log" in opcodes:
        return Operation("logarithms")
    if any(opcode.startswith("reduce") for opcode in opcodes):
        return Operation("maxima and sums")
    if all(opcode in _MOVES for opcode in opcodes):
        return Operation("copies")
    if all(opcode in {"broadcast", "constant", "parameter", "bitcast"} for opcode in opcodes):
        return Operation("buffers filled")
    return Operation("other arithmetic")


def _product_size(dot: re.Match[str], around: Sequence[re.Match[str]]) -> tuple[int, bool]:
    """Returns floating-point operations of a product, and whether one factor is a vector."""
    types = {i["name"]: i["type"] for i in around}
    left, right = (
        _dimensions(types[re.findall(r"%([\w.\-]+)", operand)[-1]])
        for operand in dot["operands"].split(", ")
    )
    axes = {
        (side, what): _axes(dot["rest"], f"{side}_{what}_dims")
        for side in ("lhs", "rhs")
        for what in ("batch", "contracting")
    }
    free = [
        math.prod(n for axis, n in enumerate(shape) if axis not in used)
        for shape, used in (
            (left, axes["lhs", "batch"] | axes["lhs", "contracting"]),
            (right, axes["rhs", "batch"] | axes["rhs", "contracting"]),
        )
    ]
    shared = math.prod(left[a] for a in axes["lhs", "batch"] | axes["lhs", "contracting"])
    return 2 * shared * free[0] * free[1], 1 in free


def _dimensions(kind: str) -> list[int]:
    """Returns the shape in a type such as ``f32[8,64]{1,0}``."""
    inside = kind[kind.index("[") + 1 : kind.index("]")]
    return [int(n) for n in inside.split(",") if n]


def _axes(attributes: str, name: str) -> set[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return {int(n) for n in found[1].split(",")} if found else set()


def measure(function: Callable[..., Any], arrays: Sequence[Any], calls: int) -> dict[str, Share]:
    """Measures where the time of a call goes.

    The time of an operation is the median of its runs times their number in a call.

    Args:
      function: a jittable function of arrays.
      arrays: its arguments.
      calls: how many to record, at least 1.

    Returns:
      Shares of the time by kind, those of :data:`KINDS` that occur, largest first.

    Raises:
      RuntimeError: If the profiler recorded no operation, as on devices other than the CPU.
    """
    import jax

    compiled = jax.jit(function).lower(*arrays).compile()
    text = compiled.as_text()
    assert text is not None
    operations = read_operations(text)
    jax.block_until_ready(compiled(*arrays))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(compiled(*arrays))
        file = next(Path(folder).rglob("*.xplane.pb"))
        runs = _recorded(file, operations)
    if not runs:
        raise RuntimeError(
            f"the profiler recorded no operation on {jax.default_backend()!r}: "
            "set JAX_PLATFORMS=cpu, this profile is for CPUs"
        )
    largest = max((op.flops for name, op in operations.items() if name in runs), default=0)
    shares: dict[str, Share] = {}
    for name, seconds in runs.items():
        operation = operations[name]
        kind = operation.kind
        if kind == "products":
            kind = "large products" if operation.flops >= LARGE * largest else "small products"
        share = shares.get(kind, Share(0.0, 0, 0))
        shares[kind] = Share(
            share.seconds + statistics.median(seconds) * len(seconds) / calls,
            share.operations + 1,
            share.flops + operation.flops * len(seconds) // calls,
        )
    return dict(sorted(shares.items(), key=lambda item: -item[1].seconds))


def _recorded(file: Path, operations: Mapping[str, Operation]) -> dict[str, list[float]]:
    """Returns the seconds of each run of the operations in a file of the profiler."""
    import jax

    runs: dict[str, list[float]] = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in operations and any(key == "hlo_op" for key, _ in event.stats):
                    runs[event.name].append(event.duration_ns * 1e-9)
    return runs


def make_table(shares: Mapping[str, Share]) -> str:
    """Returns the shares as a table in Markdown."""
    total = sum(share.seconds for share in shares.values())
    rows = [
        "| kind | operations | ms | % | GFLOP/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, share in shares.items():
        speed = f"{share.flops / share.seconds / 1e9:.0f}" if share.flops else ""
        rows.append(
            f"| {kind} | {share.operations} | {share.seconds * 1e3:.1f} | "
            f"{100 * share.seconds / total:.0f} | {speed} |"
        )
    rows.append(f"| all | | {total * 1e3:.1f} | 100 | |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each direction and pass."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--length", type=int, default=4096, help="tokens (%(default)s)")
    add("--calls", type=int, default=5, help="calls that are recorded (%(default)s)")
    add("--implementation", help="of the attention function (the default one)")
    options = parser.parse_args(arguments)
    if "jax" not in sys.modules:
        environment.use_one_core()
    import jax

    from fast_attention import make_fast_softmax_attention

    inputs = make_inputs(Setting(length=options.length))
    for causal in (True, False):
        attend = make_fast_softmax_attention(
            inputs.setting.head_dim,
            nb_features=inputs.setting.features,
            unidirectional=causal,
            redraw_features=False,
            implementation=options.implementation,
        )

        def loss(query: Any, key: Any, value: Any, attend: Any = attend) -> Any:
            return attend(query, key, value).sum()

        for name, function in (("forward", attend), ("f+b", jax.grad(loss, (0, 1, 2)))):
            print(f"{'Causal' if causal else 'Bidirectional'}, {name}:\n")
            print(make_table(measure(function, inputs.qkv, options.calls)) + "\n", flush=True)


if __name__ == "__main__":
    main()
