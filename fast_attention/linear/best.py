"""The implementation ``"by_platform"``: kernels on a TPU, chunks on XLA elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.by_platform import either
from fast_attention.linear.chunked import api as chunked
from fast_attention.linear.pallas_tpu import api as pallas_tpu
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.symbolic import is_symbolic
from fast_attention.linear.types import Inputs, Parts, Plan


def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key.

    Args:
      plan: static choices.
      inputs: arrays, see :class:`fast_attention.linear.types.Inputs`.

    Returns:
      As :func:`fast_attention.linear.chunked.api.attend`; the state counts if ``plan.complete``.
    """
    symbolic = any(is_symbolic(n) for x in inputs[:3] for n in x.shape)
    if symbolic or pallas_tpu.why_not(plan, inputs) is not None:
        return chunked.attend(plan, inputs)
    return _attend(plan, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, inputs: Inputs) -> Any:
    return either(
        lambda inputs: chunked.forward(plan, inputs, save=False)[0],
        lambda inputs: pallas_tpu.attend(plan, inputs),
        inputs,
    )


def _forward(plan: Plan, inputs: Inputs) -> tuple[Any, Any]:
    # What chunks keep is nothing to the kernels: they run again for the gradient, and in a
    # program of both passes the second run is the first.
    def save(inputs: Inputs) -> Any:
        result, (_, _, *kept) = chunked.forward(plan, inputs, save=True)
        return result, kept

    def with_kernels(inputs: Inputs) -> Any:
        _, kept = jax.eval_shape(save, inputs)
        result, _ = jax.vjp(functools.partial(pallas_tpu.attend, plan), inputs)
        return result, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)

    result, kept = either(save, with_kernels, inputs)
    return result, (inputs, result[0], kept)


def _backward(plan: Plan, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    def in_chunks(inputs: Inputs, out: Any, kept: Any, cotangents: Any) -> Any:
        return chunked.backward(plan, (inputs, out, *kept), cotangents)

    def with_kernels(inputs: Inputs, out: Any, kept: Any, cotangents: Any) -> Any:
        del out, kept
        mask = inputs.key_mask
        _, pull_back = jax.vjp(
            lambda smooth: pallas_tpu.attend(plan, smooth._replace(key_mask=mask)),
            inputs._replace(key_mask=None),
        )
        return pull_back(cotangents)[0]

    return (either(in_chunks, with_kernels, *residuals, cotangents),)


_attend.defvjp(_forward, _backward)
