"""The implementation ``"by_platform"``: what serves a call where the program runs.

- A CPU: chunks on XLA.
- A TPU: Pallas kernels for the calls that they serve, in programs for one device and in those of
  each device inside ``jax.shard_map``; else chunks, with positions in lanes for the calls that this
  form serves.
- A GPU: chunks in parallel (causal attention); else chunks.

``"chunked"`` is the same without kernels and without chunks in parallel. Chunks are those of the
platform's rows, or of the kind of device if it is known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.by_platform import KERNELS, by_platform
from fast_attention.linear.chunked import api as chunked
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.devices import device_of_process, platform_of
from fast_attention.linear.pallas_tpu import api as pallas_tpu
from fast_attention.linear.parallel_chunks import api as parallel_chunks
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import is_symbolic
from fast_attention.linear.time_minor_chunks import api as time_minor_chunks
from fast_attention.linear.types import Inputs, Parts, Plan

Attend = Callable[[Inputs], tuple[Array | Parts, LinearAttentionState]]

LOWERED = {"cpu": ("cpu",), "gpu": ("cuda", "rocm"), "tpu": ("tpu",)}
"""What JAX calls a platform where it lowers a program."""


def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key.

    Args:
      plan: static choices.
      inputs: arrays, see :class:`fast_attention.linear.types.Inputs`.

    Returns:
      As :func:`fast_attention.linear.chunked.api.attend`; the state counts if ``plan.complete``.
    """
    if has_symbolic_sizes(inputs):
        return chunked.attend(plan, inputs)
    return _attend(True, plan, inputs)


def attend_in_chunks(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes the same as :func:`attend` in chunks, one after the other, on every platform."""
    if has_symbolic_sizes(inputs):
        return chunked.attend(plan, inputs)
    return _attend(False, plan, inputs)


def has_symbolic_sizes(inputs: Inputs) -> bool:
    """Whether a size is known only when the program runs: chunks of this process serve it then."""
    return any(is_symbolic(n) for x in inputs[:3] for n in x.shape)


def plan_on(plan: Plan, platform: str, *, every: bool = True) -> Plan:
    """Returns a plan with a kind of device of a platform, or with the platform.

    A kind that the caller named counts in programs for its platform, and that of this process's
    devices in programs for theirs. Without ``every``, for "chunked", a kind that the caller named
    counts in all programs.
    """
    if not every and plan.device_kind is not None:
        return plan
    for kind in (plan.device_kind, device_of_process()):
        if kind is not None and _platform(kind) == platform:
            return dataclasses.replace(plan, device_kind=kind)
    return dataclasses.replace(plan, device_kind=platform)


def in_lanes(plan: Plan, inputs: Inputs) -> bool:
    """Whether a TPU computes a call without kernels in chunks whose positions lie in lanes."""
    return time_minor_chunks.why_not(plan, inputs) is None


def in_parallel(plan: Plan, inputs: Inputs) -> bool:
    """Whether a GPU computes a call in parallel chunks."""
    return plan.causal and parallel_chunks.why_not(plan, inputs) is None


def _platform(kind: str) -> str | None:
    try:
        return platform_of(kind)
    except ValueError:
        return None  # This process's device is of an unknown kind.


def _home() -> str:
    """The platform of this process's devices: programs for it are the most likely."""
    return _platform(device_of_process()) or "cpu"


def _on_xla(every: bool, plan: Plan, inputs: Inputs, platform: str) -> tuple[Any, Plan]:
    """Returns the module that serves a call without kernels, and its plan."""
    module = chunked
    if platform == "tpu" and in_lanes(plan, inputs):
        module = time_minor_chunks
    elif every and platform == "gpu" and in_parallel(plan, inputs):
        module = parallel_chunks
    return module, plan_on(plan, platform, every=every)


def _forms(every: bool, plan: Plan, inputs: Inputs) -> dict[str, Attend]:
    """Returns what is not computed as at home, by the name of a lowered platform."""
    forms: dict[str, Attend] = {}
    module, there = _on_xla(every, plan, inputs, _home())
    home = module, planned_chunk(there, inputs)
    for platform, names in LOWERED.items():
        module, there = _on_xla(every, plan, inputs, platform)
        if (module, planned_chunk(there, inputs)) != home:
            forms |= dict.fromkeys(names, functools.partial(module.attend, there))
    if every and pallas_tpu.why_not(plan, inputs) is None:
        forms["tpu" + KERNELS] = functools.partial(pallas_tpu.attend, plan)
    return forms


# The first argument: whether kernels and chunks in parallel may serve the call.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(every: bool, plan: Plan, inputs: Inputs) -> Any:
    module, there = _on_xla(every, plan, inputs, _home())
    return by_platform(
        lambda inputs: module.forward(there, inputs, save=False)[0],
        _forms(every, plan, inputs),
        inputs,
    )


def _forward(every: bool, plan: Plan, inputs: Inputs) -> tuple[Any, Any]:
    module, there = _on_xla(every, plan, inputs, _home())

    def save(inputs: Inputs) -> Any:
        result, (_, _, *kept) = module.forward(there, inputs, save=True)
        return result, kept

    # What is kept at home is nothing to the other forms: they run again for the gradient. In a
    # program of both passes XLA finds that the second run of a kernel is the first.
    def saves_nothing(form: Attend) -> Callable[[Inputs], Any]:
        def run(inputs: Inputs) -> Any:
            _, kept = jax.eval_shape(save, inputs)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)
            return _differentiated(form, inputs)[0], zeros

        return run

    forms = {name: saves_nothing(form) for name, form in _forms(every, plan, inputs).items()}
    result, kept = by_platform(save, forms, inputs)
    return result, (inputs, result[0], kept)


def _backward(every: bool, plan: Plan, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    module, there = _on_xla(every, plan, residuals[0], _home())

    def at_home(inputs: Inputs, out: Any, kept: Any, cotangents: Any) -> Any:
        return module.backward(there, (inputs, out, *kept), cotangents)

    def runs_again(form: Attend) -> Callable[..., Any]:
        def pull_back(inputs: Inputs, out: Any, kept: Any, cotangents: Any) -> Any:
            del out, kept
            return _differentiated(form, inputs)[1](cotangents)

        return pull_back

    forms = {name: runs_again(form) for name, form in _forms(every, plan, residuals[0]).items()}
    return (by_platform(at_home, forms, *residuals, cotangents),)


def _differentiated(form: Attend, inputs: Inputs) -> tuple[Any, Callable[[Any], Inputs]]:
    """Returns results, and what makes the gradient of every float array of the inputs."""
    constant = {"key_mask": inputs.key_mask, "segment_ids": inputs.segment_ids}
    result, pull_back = jax.vjp(
        lambda smooth: form(smooth._replace(**constant)),
        inputs._replace(**dict.fromkeys(constant)),
    )
    return result, lambda cotangents: pull_back(cotangents)[0]


_attend.defvjp(_forward, _backward)
