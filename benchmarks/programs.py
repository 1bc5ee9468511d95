"""A program is one case, compiled for one shape and one measure, ready to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.settings import Inputs

FORWARD, BACKWARD = "forward", "f+b"
MEASURES = (FORWARD, BACKWARD)
"""``f+b`` is the output and the gradients of query, key and value."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to time.

    Attributes:
      call: starts the computation and returns its results.
      wait: returns when the given results are there.
      memory: bytes of temporaries and results as the compiler planned them; None if not known.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], object]
    memory: int | None = None


def compile_jax(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    inputs: Inputs,
    measure: str,
) -> Program:
    """Compiles a function of query, key and value.

    Args:
      function: what is measured.
      arrays: its arguments.
      inputs: where the cotangent of the output comes from.
      measure: one of :data:`MEASURES`.

    Raises:
      NotImplementedError: if the function cannot serve the shape or the platform.
    """
    if measure == FORWARD:
        return jitted(function, *arrays)

    def both(*arguments):
        *arrays, cotangent = arguments
        out, pull_back = jax.vjp(function, *arrays)
        return out, *pull_back(cotangent)

    return jitted(both, *arrays, inputs.cotangent)


def jitted(function: Callable[..., Any], *arrays: Any) -> Program:
    """Compiles ``function`` for just these arguments, so that no call pays for a cache look-up."""
    compiled = jax.jit(function).lower(*arrays).compile()
    analysis = compiled.memory_analysis()
    memory = None
    if analysis is not None:
        memory = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return Program(lambda: compiled(*arrays), jax.block_until_ready, memory)
