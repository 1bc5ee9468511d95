"""How the tests compile: fast, and as users have it where that matters.

Nearly all of the suite's time is XLA's. Without optimisations, and with its older emitters of fused
loops, it compiles a program four to five times as fast.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

EMITTERS = "xla_cpu_use_fusion_emitters"
OPTIMIZATIONS = "jax_disable_most_optimizations"
UNKNOWN = "TESTS_FUSION_EMITTERS_ARE_UNKNOWN"


def compile_fast() -> None:
    """Sets how all programs of this process, and of those that it starts, are compiled.

    It must come before the first computation.
    """
    jax.config.update(OPTIMIZATIONS, True)
    # XLA ends a process that sets a flag it does not know, as a later version may not know this.
    if EMITTERS not in _flags() and _xla_knows(EMITTERS):
        os.environ["XLA_FLAGS"] = f"{_flags()} --{EMITTERS}=false".strip()


def compiled(function: Callable, **options: Any) -> Any:
    """Jits; under the fixture `optimized`, as users have it."""
    if not jax.config.read(OPTIMIZATIONS) and EMITTERS in _flags():
        options[EMITTERS] = True
    return jax.jit(function, compiler_options=options)


def _flags() -> str:
    return os.environ.get("XLA_FLAGS", "")


def _xla_knows(flag: str) -> bool:
    """Asks another process, once: the answer is left to those that this one starts."""
    if UNKNOWN not in os.environ:
        asked = os.environ | {"XLA_FLAGS": f"{_flags()} --{flag}=false"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(command, env=asked, capture_output=True).returncode == 0:
            return True
        os.environ[UNKNOWN] = "1"
    return False
