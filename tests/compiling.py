"""How the tests compile: fast, and as users have it where that matters.

Nearly all of the suite's time is XLA's. Without optimisations, and with its older emitters of fused
loops, it compiles a program four to five times as fast. By default it also cuts a program into as
many as 32 modules for LLVM, which is faster only with as many idle processors.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

EMITTERS = "xla_cpu_use_fusion_emitters"
OPTIMIZATIONS = "jax_disable_most_optimizations"
FAST = {EMITTERS: "false", "xla_cpu_parallel_codegen_split_count": "1"}
UNKNOWN = "TESTS_UNKNOWN_XLA_FLAGS"


def compile_fast() -> None:
    """Sets how all programs of this process, and of those that it starts, are compiled.

    It must come before the first computation.
    """
    jax.config.update(OPTIMIZATIONS, True)
    # XLA ends a process that sets a flag it does not know, as a later version may not know these.
    for name, value in FAST.items():
        if name not in _flags() and _xla_knows(f"--{name}={value}"):
            os.environ["XLA_FLAGS"] = f"{_flags()} --{name}={value}".strip()


def compiled(function: Callable, **options: Any) -> Any:
    """Jits; under the fixture `optimized`, as users have it."""
    if not jax.config.read(OPTIMIZATIONS) and EMITTERS in _flags():
        options[EMITTERS] = True
    return jax.jit(function, compiler_options=options)


def _flags() -> str:
    return os.environ.get("XLA_FLAGS", "")


def _xla_knows(flag: str) -> bool:
    """Asks another process, once: the answer is left to those that this one starts."""
    unknown = os.environ.get(UNKNOWN, "")
    if flag not in unknown.split():
        asked = os.environ | {"XLA_FLAGS": f"{_flags()} {flag}"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(command, env=asked, capture_output=True).returncode == 0:
            return True
        os.environ[UNKNOWN] = f"{unknown} {flag}"
    return False
