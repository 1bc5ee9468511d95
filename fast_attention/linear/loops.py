"""Loops over chunks: whole ones in a scan, what is left over in one shorter chunk, no padding.

A loop may be cut into groups of chunks, each run by a loop of its own, so that something is saved
once a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array
from fast_attention.manual_axes import vary_alike


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
    loop runs it if the condition holds for any row.

    Args:
      condition: bool ``[]``.
      body: from arrays to arrays of the same shapes and types.
      carry: the arrays.
    """
    return jax.lax.while_loop(
        lambda loop: loop[0],
        lambda loop: (jnp.zeros_like(loop[0]), body(loop[1])),
        vary_alike((condition, carry)),
    )[1]
