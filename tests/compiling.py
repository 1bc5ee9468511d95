"""How the tests compile: fast, and as users have it where that matters.

Nearly all of the suite's time is XLA's. Without optimisations, and with its older emitters of fused
loops, it compiles a program four to five times as fast.
"""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

EMITTERS = "xla_cpu_use_fusion_emitters"
OPTIMIZATIONS = "jax_disable_most_optimizations"


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
    for library in Path(jaxlib.__file__).parent.glob("libjax_common*"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(flag.encode()) >= 0:
                return True
    return False
