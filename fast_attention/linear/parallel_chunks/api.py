"""Linear attention on XLA in a form for GPUs: few launches, each over many positions.

A causal pass walks over blocks of some thousand positions (of all rows and heads together) and
handles all chunks of a block in parallel: their keys make states of their own, one sum over those
gives the state before each chunk, and one product for each step serves all chunks. Inside a chunk
the arithmetic is that of :mod:`fast_attention.linear.chunked`, running maxima included, and so is
bidirectional attention, in chunks as long as a block.

References: arXiv:2009.14794 (FAVOR+); Yang et al., "Gated Linear Attention Transformers with
Hardware-Efficient Training", arXiv:2312.06635, section 4.2 (states of all chunks first, then all
outputs).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked import api as chunked
from fast_attention.linear.parallel_chunks import causal
from fast_attention.linear.parallel_chunks.block_sizes import positions_at_once
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import is_symbolic
from fast_attention.linear.types import Inputs, Parts, Plan

ARRAYS = frozenset(
    ("query", "key", "value", "parameters", "key_mask", "key_bias", "segment_ids", "state")
)
"""Fields of :class:`Inputs` that are served."""


def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key.

    Args:
      plan: static choices.
      inputs: arrays, see :class:`Inputs`.

    Returns:
      As :func:`fast_attention.linear.chunked.api.attend`.

    Raises:
      NotImplementedError: for a call that :func:`why_not` names a reason for.
    """
    reason = why_not(plan, inputs)
    if reason is not None:
        raise NotImplementedError(reason)
    if not plan.causal:
        chunk = plan.chunk_size or positions_at_once(plan, inputs)
        return chunked.attend(dataclasses.replace(plan, chunk_size=chunk), inputs)
    return _attend(plan, inputs)


def why_not(plan: Plan, inputs: Inputs) -> str | None:
    """Returns why parallel chunks do not serve a call, or None if they do."""
    shape = (*inputs.query.shape, inputs.key.shape[1])
    if any(map(is_symbolic, shape)):
        return f"Parallel chunks need known sizes, got {shape}."
    if plan.saved_states == "all":
        return "Parallel chunks keep one state for several chunks, got saved_states='all'."
    given = {name for name, x in inputs._asdict().items() if x is not None}
    if given - ARRAYS:
        return f"Parallel chunks do not support {', '.join(sorted(given - ARRAYS))}."
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    return forward(plan, inputs, save=False)[0]


def forward(plan: Plan, inputs: Inputs, *, save: bool) -> tuple[Any, Any]:
    """Returns output and state of causal attention, and what :func:`backward` needs if ``save``."""
    return causal.forward(plan, inputs, save=save)


def backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    """Returns the gradient of every float array in the inputs, of causal attention."""
    return causal.backward(plan, residuals, cotangents)


_attend.defvjp(
    lambda plan, inputs: forward(plan, inputs, save=True),
    lambda plan, residuals, cotangents: (backward(plan, residuals, cotangents),),
)
