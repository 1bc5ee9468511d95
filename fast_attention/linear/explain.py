"""Describes the implementation, kernel and chunk size of the calls of a function."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fast_attention.linear import best
from fast_attention.linear.chunked.chunk_choice import origin, planned_chunk, planned_row
from fast_attention.linear.pallas_tpu import api as pallas_tpu
from fast_attention.linear.parallel_chunks.block_sizes import block_sizes
from fast_attention.linear.time_minor_chunks import api as time_minor_chunks
from fast_attention.linear.types import Inputs, Plan

_calls: contextvars.ContextVar[list[tuple[Plan, Inputs]] | None] = contextvars.ContextVar(
    "calls of linear attention", default=None
)


def note_call(plan: Plan, inputs: Inputs) -> None:
    """Records a call for :func:`explain`, if that is running."""
    calls = _calls.get()
    if calls is not None:
        calls.append((plan, inputs))


def explain(function: Callable[..., Any], *args: Any, platform: str | None = None) -> str:
    """Describes how the linear attention in a function is computed, without running it.

    Args:
      function: an attention function, or any function that calls linear attention.
      *args: its arguments, arrays or ``jax.ShapeDtypeStruct``.
      platform: "cpu", "gpu" or "tpu", of a program for one device, or of those of each device in
        ``jax.shard_map``; None for that of ``jax.default_backend()``.

    Returns:
      A line for each call of linear attention: the call, the implementation that computes it on the
        platform, and why kernels are not used, if they are not.

    Raises:
      ValueError: for another platform.
    """
    platform = platform or jax.default_backend()
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f'platform must be "cpu", "gpu" or "tpu", got {platform!r}.')
    token = _calls.set([])
    try:
        jax.eval_shape(lambda *args: function(*args), *args)
        calls = _calls.get() or []
        lines = [f"{_called(*call)}: {_served(*call, platform)}" for call in calls]
    finally:
        _calls.reset(token)
    return "\n".join(lines) or "No call of linear attention."


def _called(plan: Plan, inputs: Inputs) -> str:
    direction = "causal" if plan.causal else "bidirectional"
    shape = "x".join(str(n) for n in inputs.query.shape)
    return f"{direction} {type(plan.feature_map).__name__}, query {inputs.query.dtype}[{shape}]"


def _served(plan: Plan, inputs: Inputs, platform: str) -> str:
    requested = plan.implementation == "chunked"
    if not requested and plan.implementation not in (None, "by_platform"):
        return f"{plan.implementation}, as asked for"
    if best.has_symbolic_sizes(inputs):
        return f"{_chunks(plan, inputs)}, because sizes are known only when the program runs"
    there = best.plan_on(plan, platform, every=not requested)
    if platform == "gpu" and not requested and best.in_parallel(plan, inputs):
        sizes = block_sizes(there, inputs)
        return f"chunks of {sizes.chunk} on XLA, those of {sizes.block} positions in parallel"
    chunks = _chunks(there, inputs)
    if platform == "tpu":
        chunks = f"{chunks}{_layout(plan, inputs)}"
    if requested:
        return f"chunked, as requested: {chunks}"
    if plan.axis_name is not None and not plan.causal:
        return f"{chunks}, because the sequence is sharded along {plan.axis_name}"
    if platform != "tpu":
        return chunks
    reason = pallas_tpu.why_not(plan, inputs)
    if reason is not None:
        return f"{chunks}, because: {reason}"
    kernels = f"TPU kernels, {pallas_tpu.describe(plan, inputs)}"
    if plan.axis_name is not None and inputs.log_decay is None:
        both_ways = dataclasses.replace(plan, causal=False)
        states = _chunks(dataclasses.replace(there, causal=False), inputs)
        kernels = f"{kernels}, and states of all keys in {states}{_layout(both_ways, inputs)}"
    return f"{kernels}; {chunks} where XLA partitions the program over devices"


def _chunks(plan: Plan, inputs: Inputs) -> str:
    chunk = planned_chunk(plan, inputs).chunk_size
    row = planned_row(plan, inputs)
    asked = "as asked for" if plan.chunk_size else f"from the table: {origin(row)}"
    return f"chunks of {chunk} on XLA ({asked})"


def _layout(plan: Plan, inputs: Inputs) -> str:
    reason = time_minor_chunks.why_not(plan, inputs)
    if reason is None:
        return " with positions in lanes"
    return f" in the form for CPUs ({reason.rstrip('.')})"
