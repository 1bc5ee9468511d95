"""Loops over chunks: whole ones in a scan, what is left over in one shorter chunk, no padding.

A loop may be cut into groups of chunks, each run by a loop of its own, so that something is saved
once a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend import core

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array


def scan_chunks(
    body: Callable[[Any, Array | int, int], tuple[Any, Any]],
    carry: Any,
    length: int,
    size: int,
    unroll: int,
    offset: Array | int = 0,
) -> tuple[Any, tuple[Any, Any]]:
    """Runs ``body(carry, start, size)`` over chunks from ``offset``; returns what each saved."""
    if not length:
        return carry, (None, None)
    count, rest = divmod(length, size)
    carry, saved = jax.lax.scan(
        lambda carry, i: body(carry, offset + i * size, size),
        carry,
        jnp.arange(count),
        unroll=unroll,
    )
    if not rest:
        return carry, (saved, None)
    carry, last = body(carry, offset + count * size, rest)
    return carry, (saved, last)


def scan_chunks_back(
    body: Callable[[Any, Array | int, int, Any], Any],
    carry: Any,
    saved: tuple[Any, Any],
    length: int,
    size: int,
    unroll: int,
    offset: Array | int = 0,
) -> Any:
    """Runs ``body(carry, start, size, saved)`` over the same chunks from last to first."""
    if not length:
        return carry
    count, rest = divmod(length, size)
    states, last = saved
    if rest:
        carry = body(carry, offset + count * size, rest, last)
    carry, _ = jax.lax.scan(
        lambda carry, x: (body(carry, offset + x[0] * size, size, x[1]), None),
        carry,
        (jnp.arange(count), states),
        reverse=True,
        unroll=unroll,
    )
    return carry


def run_if(condition: Array, body: Callable[[Any], Any], carry: Any) -> Any:
    """Returns ``body(carry)`` if ``condition`` holds, else ``carry``.

    This is a loop of at most one round. Under ``vmap``, ``lax.cond`` would run the body always; the
    loop runs it if the condition holds for any row. Derivatives, of any order and either mode, are
    those of ``lax.cond``: JAX has no reverse mode of such a loop.

    Args:
      condition: bool ``[]``.
      body: from arrays to arrays of the same shapes and types.
      carry: the arrays.
    """
    carry = vary_alike(carry, condition)
    call, closed_over = _with_constants_as_arguments(body, carry)

    @jax.custom_jvp
    def run(condition: Array, carry: Any, closed_over: Any) -> Any:
        return jax.lax.while_loop(
            lambda loop: loop[0],
            lambda loop: (jnp.zeros_like(loop[0]), call(closed_over, loop[1])),
            vary_alike((condition, carry)),
        )[1]

    @jax.checkpoint
    def choose(condition: Array, carry: Any, closed_over: Any) -> Any:
        return jax.lax.cond(condition, lambda: call(closed_over, carry), lambda: carry)

    run.defjvp(lambda primals, tangents: jax.jvp(choose, primals, tangents))
    return run(condition, carry, closed_over)


def repeat_while(
    condition: Callable[[Any], Array], body: Callable[[Any], Any], carry: Any, most: int
) -> Any:
    """Applies ``body`` as long as ``condition(carry)`` holds.

    Derivatives, of any order and either mode, are those of ``most`` rounds of ``lax.cond``.

    Args:
      condition: to bool ``[]``.
      body: from arrays to arrays of the same shapes and types.
      carry: the arrays.
      most: the number of rounds after which ``condition`` does not hold.
    """
    carry = vary_alike(carry)
    wanted, of_wanted = _with_constants_as_arguments(condition, carry)
    call, of_call = _with_constants_as_arguments(body, carry)

    @jax.custom_jvp
    def run(carry: Any, of_wanted: Any, of_call: Any) -> Any:
        return jax.lax.while_loop(
            lambda carry: wanted(of_wanted, carry), lambda carry: call(of_call, carry), carry
        )

    def rounds(carry: Any, of_wanted: Any, of_call: Any) -> Any:
        @jax.checkpoint
        def one(carry: Any, _: None) -> tuple[Any, None]:
            goes_on = wanted(of_wanted, carry)
            return jax.lax.cond(goes_on, lambda: call(of_call, carry), lambda: carry), None

        return jax.lax.scan(one, carry, length=most)[0]

    run.defjvp(lambda primals, tangents: jax.jvp(rounds, primals, tangents))
    return run(carry, of_wanted, of_call)


def _with_constants_as_arguments(
    function: Callable[[Any], Any], example: Any
) -> tuple[Callable[[Any, Any], Any], Any]:
    """Makes what a function closes over an argument, as derivatives of one's own need it.

    Returns:
      ``call`` and ``constants``, so that ``call(constants, x)`` is ``function(x)`` for all x of the
      shapes and types of ``example``.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(example)
    tree, jaxpr = jax.tree.structure(shape), closed.jaxpr
    if getattr(jaxpr, "consts", None):
        # From JAX 0.12 on this, too, holds the constants: tracers that would outlive their trace.
        jaxpr = cast(core.Jaxpr, core.ClosedJaxpr(jaxpr, ()))

    def call(constants: Any, x: Any) -> Any:
        whole = core.ClosedJaxpr(jaxpr, constants)
        return jax.tree.unflatten(tree, core.jaxpr_as_fun(whole)(*jax.tree.leaves(x)))

    return call, closed.consts
