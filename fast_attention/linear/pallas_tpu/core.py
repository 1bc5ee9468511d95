"""Attention by the TPU kernels with its own derivative.

Letters are those of :mod:`.program`; P is 1, K or B K sets of weights.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu import (
    bidirectional_backward,
    bidirectional_forward,
    causal_backward,
    causal_forward,
    decay_rows,
)
from fast_attention.linear.pallas_tpu.backward_block import Given
from fast_attention.linear.pallas_tpu.operands import Operands, Results
from fast_attention.linear.pallas_tpu.program import Program, both_parts


class Arguments(NamedTuple):
    """The arrays of a call; logarithms are to base 2, features padded to whole lanes.

    Attributes:
      query: ``[B H, D, T]``.
      key: ``[B K, D, S]``.
      value: ``[B K, V, S]``.
      query_weights: ``[P, D, M]``, float32.
      key_weights: the same.
      query_offset: ``[P, 1, M]``.
      key_offset: the same.
      key_log: ``[B K, 1, S]``, or None.
      scale: constant for differentiation, ``[B K, 1, M]``; see :class:`.operands.Operands`.
      kv: the state before, on that scale, ``[B K, V + 16, M]``, or None if it is empty.
      log_decay: ``[B K, 1, S]``, or None.
      alive: constant for differentiation, 1 for tokens at which some key has been seen, else 0,
        ``[B K, 1, S]``; None for all.
    """

    query: Array
    key: Array
    value: Array
    query_weights: Array
    key_weights: Array
    query_offset: Array
    key_offset: Array
    key_log: Array | None
    scale: Array
    kv: Array | None
    log_decay: Array | None = None
    alive: Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_with_kernels(
    program: Program, final: bool, arguments: Arguments
) -> tuple[Array, tuple[Array, Array] | None]:
    """Computes attention.

    Args:
      program: static choices.
      final: also return the final state.
      arguments: arrays.

    Returns:
      ``[B H, V, T]``, and the final state ``[B K, V + 16, M]`` with its scale ``[B K, 1, M]``.
    """
    results = _run(program, final, arguments, save=False)
    return results.out, ((results.kv, results.scale) if final else None)


def _run(program: Program, final: bool, arguments: Arguments, *, save: bool) -> Results:
    module = causal_forward if program.causal else bidirectional_forward
    return module.forward(program, _operands(program, arguments), save=save, final=final)


def _operands(program: Program, arguments: Arguments) -> Operands:
    parts = lambda x: both_parts(program, x, axis=1)  # noqa: E731
    read = arguments._asdict()
    log_decay, alive = read.pop("log_decay"), read.pop("alive")
    read["query_weights"] = parts(arguments.query_weights)
    read["key_weights"] = parts(arguments.key_weights)
    if log_decay is not None:
        read["decay"] = decay_rows.rows_of(program, log_decay, alive)
    return Operands(**read)


def _forward(program: Program, final: bool, arguments: Arguments) -> tuple[Any, Any]:
    results = _run(program, final, arguments, save=True)
    state = (results.kv, results.scale) if final else None
    return (results.out, state), (arguments, results)


def _backward(program: Program, final: bool, residuals: Any, cotangents: Any) -> tuple[Arguments]:
    arguments, results = residuals
    d_out, d_state = cotangents
    operands = _operands(program, arguments)
    given = Given(results.out, d_out, results.denominator, d_state[0] if final else None)
    if program.causal:
        run = functools.partial(
            causal_backward.backward,
            program,
            operands,
            given,
            causal_backward.Saved(results.states, results.before, results.after, results.again),
        )
    else:
        run = functools.partial(
            bidirectional_backward.backward, program, operands, given, results.kv, results.scale
        )
    # Two launches: where the gradients of weights are not used, the second one is dead code.
    gradients, of_weights = run(weights=False), run(weights=True)
    d_query_weights, d_query_offset = _shared(program, arguments, of_weights.query_weights)
    d_key_weights, d_key_offset = _shared(program, arguments, of_weights.key_weights)
    return (
        Arguments(
            query=gradients.query,
            key=gradients.key,
            value=gradients.value,
            query_weights=d_query_weights,
            key_weights=d_key_weights,
            query_offset=d_query_offset,
            key_offset=d_key_offset,
            key_log=gradients.key_log,
            scale=jnp.zeros_like(arguments.scale),
            kv=gradients.kv,
            log_decay=None
            if gradients.decay is None
            else decay_rows.gradient_of(program, gradients.decay),
            alive=None if arguments.alive is None else jnp.zeros_like(arguments.alive),
        ),
    )


attend_with_kernels.defvjp(_forward, _backward)


def _shared(program: Program, arguments: Arguments, gradient: Array) -> tuple[Array, Array]:
    """Adds the gradients ``[B K, D + 16, M]`` of heads with the same weights; splits the offset."""
    sets = arguments.query_weights.shape[0]
    gradient = gradient.reshape(-1, sets, *gradient.shape[1:]).sum(axis=0)
    d = program.head_dim
    return gradient[:, :d], gradient[:, d : d + 1]
