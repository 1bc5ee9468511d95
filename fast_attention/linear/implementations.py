"""Implementations of linear attention by name, and the choice of one for a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fast_attention.linear import best, quadratic
from fast_attention.linear.chunked import api as chunked
from fast_attention.linear.pallas_gpu import api as pallas_gpu
from fast_attention.linear.pallas_tpu import api as pallas_tpu
from fast_attention.linear.parallel_chunks import api as parallel_chunks
from fast_attention.linear.segments import attend_within_segments
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.time_minor_chunks import api as time_minor_chunks
from fast_attention.linear.types import Inputs, Plan

Implementation = Callable[[Plan, Inputs], Any]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "by_platform": best.attend,
    "chunked": best.attend_in_chunks,
    "pallas_gpu": pallas_gpu.attend,
    "pallas_gpu_interpret": pallas_gpu.attend_interpreted,
    "parallel_chunks": parallel_chunks.attend,
    "pallas_tpu": pallas_tpu.attend,
    "pallas_tpu_interpret": pallas_tpu.attend_interpreted,
    "quadratic": quadratic.attend,
    "reference": chunked.attend_plainly,
    "time_minor_chunks": time_minor_chunks.attend,
}
"""Implementations by name. One raises NotImplementedError for calls it cannot serve.

``"by_platform"``, the default, is the kernels of ``"pallas_tpu"`` in programs for one TPU, and for
each TPU in ``jax.shard_map``, for calls that they serve; ``"parallel_chunks"`` in programs for GPUs
where attention is causal; and ``"chunked"`` in all others.

``"chunked"`` has chunk sizes of its own on each platform, and in programs for TPUs the form
``"time_minor_chunks"``, positions in lanes, for the calls that this serves. By its own name that
form runs on any platform.

``"reference"`` is the forward pass of ``"chunked"`` without a gradient of its own: JAX
differentiates it in both modes, ``jax.jvp`` and ``jax.linearize`` included, in memory linear in the
length. ``"quadratic"`` writes out every weight, to check the others on short sequences.

``"pallas_gpu_interpret"`` and ``"pallas_tpu_interpret"`` run the kernels of ``"pallas_gpu"`` and
``"pallas_tpu"`` on any platform, slowly, to check them.
"""

DECAYING = ("by_platform", "chunked", "pallas_tpu", "pallas_tpu_interpret", "reference")
"""Those that serve calls with ``log_decay``."""

DEFAULT_ORDER = ("by_platform",)


def run(plan: Plan, inputs: Inputs) -> tuple[Any, LinearAttentionState]:
    """Runs the first implementation of the plan that can serve a prepared call."""
    if inputs.segment_ids is not None and not plan.causal:
        return attend_within_segments(run, plan, inputs)
    names = implementation_names(plan.implementation)
    errors: list[NotImplementedError] = []
    if inputs.log_decay is not None:
        names = tuple(name for name in names if name in DECAYING)
    for name in names:
        try:
            return IMPLEMENTATIONS[name](plan, inputs)
        except NotImplementedError as error:
            if len(names) == 1:
                raise
            errors.append(error)
    raise ExceptionGroup(f"No implementation of {names} supports this call.", errors)


def check_decays(plan: Plan) -> None:
    """Raises NotImplementedError if a plan cannot serve calls with ``log_decay``."""
    names = implementation_names(plan.implementation)
    if not set(names) & set(DECAYING):
        raise NotImplementedError(
            f"implementation={plan.implementation!r} does not support log_decay: leave "
            f"implementation out, or use one of {DECAYING}."
        )


def implementation_names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names to try in order, for what the caller asks for."""
    if implementation is None:
        return DEFAULT_ORDER
    if isinstance(implementation, str) or not isinstance(implementation, Sequence):
        implementation = (implementation,)
    names = tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"Unknown implementation {unknown}; choose from {sorted(IMPLEMENTATIONS)}."
        )
    return names
