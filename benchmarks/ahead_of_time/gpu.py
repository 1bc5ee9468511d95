"""What XLA and ptxas say of the programs for an H100: ``python -m benchmarks.ahead_of_time.gpu``.

Compiles linear attention ahead of time, on a machine without a GPU, and prints for each
implementation how many kernels a call launches, how much memory it needs besides arguments and
results (in arrays of ``[B, T, H, D]``), and of kernels written by hand the registers of a thread
and the bytes it spills. Nothing is run. :mod:`.hopper` says which packages that needs.

On a GPU XLA tries several ways to multiply and takes the fastest; here it takes what it holds to be
fast, so that counts may differ a little.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.ahead_of_time.hopper import hopper
from benchmarks.ahead_of_time.launches import count_launches
from benchmarks.programs import BACKWARD, FORWARD
from benchmarks.settings import Setting

STANDARD = Setting(length=4096, batch=8, heads=8, head_dim=64, features=256, dtype="bfloat16")

IMPLEMENTATIONS = ("chunked", "parallel_chunks", "pallas_gpu")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles every case in a process of its own, whose output ptxas writes to, and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ahead_of_time.gpu",
        description="Launches, memory and registers of programs compiled for an H100.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    add("--length", type=int, default=STANDARD.length)
    add("--batch", type=int, default=STANDARD.batch)
    add("--dtype", default=STANDARD.dtype)
    add("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    setting = Setting(
        length=options.length, batch=options.batch, heads=8, features=256, dtype=options.dtype
    )
    if options.case:
        name, kind, measure = options.case
        print(json.dumps(compile_case(setting, name, kind == "causal", measure)))
        return
    print("| implementation | | pass | launches | arrays | registers | bytes spilled |")
    print("| :-- | :-- | :-- | ---: | ---: | ---: | ---: |")
    for name in options.implementations:
        for kind in ("causal", "bidirectional"):
            for measure in (FORWARD, BACKWARD):
                found = _in_a_process(options, name, kind, measure)
                kernels = found["registers"], found["spilled"]
                registers, spilled = (", ".join(map(str, x)) or "-" for x in kernels)
                print(
                    f"| {name} | {kind} | {measure} | {found['launches']} | {found['arrays']} "
                    f"| {registers} | {spilled} |",
                    flush=True,
                )


def compile_case(setting: Setting, name: str, causal: bool, measure: str) -> dict[str, Any]:
    """Compiles one case for an H100.

    Args:
      setting: the shape.
      name: the implementation.
      causal: causal or bidirectional.
      measure: the output alone, or also the gradients of query, key, value and projection.

    Returns:
      Launches and temporaries.
    """
    from fast_attention.feature_maps import PositiveFeatures
    from fast_attention.linear import Plan
    from fast_attention.linear.implementations import IMPLEMENTATIONS as by_name
    from fast_attention.linear.pallas_gpu.api import attend_on
    from fast_attention.linear.prepare import prepare

    plan = Plan(
        PositiveFeatures(setting.features),
        causal=causal,
        device_kind="NVIDIA H100",
        implementation=name,
    )

    def attend(q: Any, k: Any, v: Any, projection: Any) -> Any:
        prepared, inputs = prepare(plan, q, k, v, parameters=projection)
        if name == "pallas_gpu":
            return attend_on(prepared, inputs, interpret=False)[0]
        return by_name[name](prepared, inputs)[0]

    def total(*arrays: Any) -> Any:
        return attend(*arrays).astype(jnp.float32).sum()

    here = hopper()
    shape = (setting.batch, setting.length, setting.heads, setting.head_dim)
    like = jax.ShapeDtypeStruct(shape, setting.dtype, sharding=here)
    projection = jax.ShapeDtypeStruct(
        (setting.features, setting.head_dim), jnp.float32, sharding=here
    )
    function = attend if measure == FORWARD else jax.grad(total, argnums=(0, 1, 2, 3))
    compiled = jax.jit(function).lower(like, like, like, projection).compile()
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None and text is not None
    return {
        "launches": count_launches(text).total(),
        "arrays": round(analysis.temp_size_in_bytes / setting.tensor_bytes, 2),
    }


def kernel_figures(output: str) -> tuple[list[int], list[int]]:
    """Returns registers and bytes spilled of each kernel, from what ptxas wrote."""
    registers = [int(x) for x in re.findall(r"ptxas info +: Used (\d+) registers", output)]
    # A warning says the same before, without the stack.
    lines = [x for x in output.splitlines() if "stack frame" in x and "spill" in x]
    spilled = [re.findall(r"(\d+) bytes spill", x) for x in lines]
    return registers, [max(map(int, x)) for x in spilled]


def _in_a_process(options: Any, name: str, kind: str, measure: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.ahead_of_time.gpu", "--case", name, kind, measure]
    for option in ("length", "batch", "dtype"):
        command += [f"--{option}", str(getattr(options, option))]
    environment = {**os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    output = done.stdout.decode(errors="replace")
    found = json.loads(output.splitlines()[-1])
    found["registers"], found["spilled"] = kernel_figures(output)
    return found


if __name__ == "__main__":
    main()
