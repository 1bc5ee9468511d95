"""Linear attention in chunks on XLA: one ``lax.scan``, features made and used chunk by chunk.

The forward pass carries the state; the backward pass recomputes each chunk from the inputs and the
state at its start, in a reverse scan. No array of length T holds features, and no prefix is ever
rebuilt by subtraction.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, G = H / K, D head width,
V value width, M features, C chunk.

Reference: arXiv:2009.14794, section 2.5 (the prefix sums); the chunked form is that of Hua et al.,
"Transformer Quality in Linear Time", arXiv:2202.10447, section 3.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked import (
    bidirectional as chunked_bidirectional,
)
from fast_attention.linear.chunked import (
    causal as chunked_causal,
)
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.types import Inputs, Parts, Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key.

    Args:
      plan: static choices.
      inputs: arrays, see :class:`Inputs`.

    Returns:
      ``[B, T, H, V]`` in the computing type, or :class:`Parts` if asked for, and the state.
    """
    return forward(plan, inputs, save=False)[0]


def attend_plainly(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes the same as :func:`attend`, to be differentiated by JAX, in either mode.

    Derivatives of ``attend`` are written by hand, for which JAX has reverse mode only. Here memory
    is linear in the length too, but reverse mode keeps the features of all positions.
    """
    return forward(plan, inputs, save=False)[0]


def forward(plan: Plan, inputs: Inputs, *, save: bool) -> tuple[Any, Any]:
    """Returns output and state, and what :func:`backward` needs if ``save``."""
    return _passes(plan).forward(plan, inputs, save=save)


def backward(plan: Plan, residuals: Any, cotangents: Any) -> Inputs:
    """Returns the gradient of every float array in the inputs."""
    return _passes(plan).backward(plan, residuals, cotangents)


def _passes(plan: Plan) -> Any:
    return chunked_causal if plan.causal else chunked_bidirectional


attend.defvjp(
    lambda plan, inputs: forward(plan, inputs, save=True),
    lambda plan, residuals, cotangents: (backward(plan, residuals, cotangents),),
)
