"""Linear attention on XLA in a form for TPUs: chunks whose positions lie in lanes.

The chunked form of :mod:`fast_attention.linear.chunked` with other operands: ``[B, H, D, T]``, the
layout that XLA gives ``[B, T, H, D]`` on a TPU for D below 128, chunks of whole lanes, and one
scale that serves until a key exceeds it by 2^80. The backward pass makes the features of a chunk
again, from the inputs and the state that its rows read.

References: arXiv:2009.14794 (FAVOR+); the chunked form is that of Hua et al., "Transformer Quality
in Linear Time", arXiv:2202.10447, section 3.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import is_symbolic
from fast_attention.linear.time_minor_chunks import (
    bidirectional,
    bidirectional_backward,
    causal,
    causal_backward,
)
from fast_attention.linear.time_minor_chunks.features import is_served
from fast_attention.linear.types import Inputs, Parts, Plan


def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key.

    Args:
      plan: static choices; without ``device_kind`` and ``chunk_size`` chunks are those of a TPU.
      inputs: arrays, see :class:`Inputs`.

    Returns:
      As :func:`fast_attention.linear.chunked.api.attend`.

    Raises:
      NotImplementedError: for a call that :func:`why_not` names a reason for.
    """
    reason = why_not(plan, inputs)
    if reason is not None:
        raise NotImplementedError(reason)
    if plan.device_kind is None:
        plan = dataclasses.replace(plan, device_kind="tpu")
    return _attend(plan, inputs)


def why_not(plan: Plan, inputs: Inputs) -> str | None:
    """Returns why this form does not serve a call, or None if it does."""
    shape = (*inputs.query.shape, inputs.key.shape[1])
    if any(map(is_symbolic, shape)):
        return f"Chunks in lanes need known sizes, got {shape}."
    if plan.output != "mean":
        return f"Chunks in lanes return only normalised outputs, got output={plan.output!r}."
    if inputs.segment_ids is not None:
        return "Chunks in lanes do not support segment_ids of causal attention."
    if inputs.log_decay is not None:
        return "Chunks in lanes do not support log_decay."
    if inputs.state.kv.dtype != jnp.float32:
        return f"Chunks in lanes compute in float32, got {inputs.state.kv.dtype}."
    if not is_served(plan.feature_map, inputs.parameters, inputs.key.shape[-1]):
        return (
            "Chunks in lanes support maps with one exponent for each feature, or with none, got "
            f"{plan.feature_map}."
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    return forward(plan, inputs, save=False)[0]


def forward(plan: Plan, inputs: Inputs, *, save: bool) -> tuple[Any, Any]:
    """Returns output and state, and what :func:`backward` needs if ``save``."""
    passes = causal if plan.causal else bidirectional
    (out, state), kept = passes.forward(plan, inputs, save=save)
    return (out, state), (inputs, out, kept)


def backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    """Returns the gradient of every float array in the inputs."""
    inputs, out, kept = residuals
    passes = causal_backward if plan.causal else bidirectional_backward
    # Arrays that devices share get the sum of their gradients at the end.
    smooth, pull = jax.vjp(
        lambda smooth: vary_alike(smooth, inputs, out, kept, cotangents),
        inputs._replace(key_mask=None, segment_ids=None),
    )
    inputs = smooth._replace(key_mask=inputs.key_mask)
    return pull(passes.backward(plan, inputs, out, kept, cotangents))[0]


_attend.defvjp(
    lambda plan, inputs: forward(plan, inputs, save=True),
    lambda plan, residuals, cotangents: (backward(plan, residuals, cotangents),),
)
