"""What the TPU kernels read of decay, and its gradient from what they return; in XLA.

The kernels read rows ``[B K, R, S]``, to base 2, padded to whole blocks:

- one row of bfloat16 programs, two of others: the sum of decays over a chunk up to a token, with
  steps of at least -256 (what a checked row reads of keys below that is less than it rounds);
- of exponential maps: two rows with the sum over the block up to a token;
- of exponential maps: the least denominator of a row.

A sum in two rows is one of multiples of a unit, which is exact, and one of rests: differences of
both are as exact as the decays between the two tokens, also behind decays that forget everything.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.decay import LOWEST_DECAY
from fast_attention.linear.pallas_tpu.program import LOG2_E, Program

LEAST_ROW = 2.0**-40
"""Denominators below it are computed again: features that underflow are 2^-126 of the largest, keys
exceed the scale by up to 2^60, so that a row loses 2^-26 of a denominator at most."""

LEAST_STATE = 2.0**-50
"""Sums of features in a state below it are computed again."""

LEAST_STEP = -256.0
KEPT = 16.0
"""Scales are left as they are while sums of features are within 2^KEPT of them."""


def read_rows(program: Program) -> int:
    """Returns how many rows hold L of a chunk."""
    return 1 if program.low else 2


def num_rows(program: Program) -> int:
    """Returns R."""
    return read_rows(program) + (3 if program.exponential else 0)


def padded_keys(program: Program) -> int:
    """Returns S in whole blocks."""
    return -(-program.keys // program.block) * program.block


def rows_of(program: Program, log_decay: Array, alive: Array | None) -> Array:
    """Returns the rows that the kernels read, ``[B K, R, S]``.

    Args:
      program: choices.
      log_decay: ``[B K, 1, S]``.
      alive: tokens at which some key has been seen, ``[B K, 1, S]``; None for all.
    """
    heads, _, keys = log_decay.shape
    more = padded_keys(program) - keys
    padded = ((0, 0), (0, 0), (0, more))
    steps = jnp.pad(log_decay * LOG2_E, padded)

    def parts(steps: Array, size: int) -> list[Array]:
        unit = 2.0 ** (math.ceil(math.log2(size * -LOWEST_DECAY * LOG2_E)) - 24)
        coarse = jnp.round(steps / unit) * unit
        return [coarse, steps - coarse]

    capped = jnp.maximum(steps, LEAST_STEP)
    rows = [capped] if program.low else parts(capped, program.chunk)
    sizes = [program.chunk] * len(rows)
    if program.exponential:
        rows += parts(steps, program.block)
        sizes += [program.block] * 2
    found = sums_until(jnp.concatenate(rows, axis=1), sizes)
    if not program.exponential:
        return found
    least = jnp.full(log_decay.shape, LEAST_ROW)
    if alive is not None:
        least = jnp.where(alive > 0, least, 0)
    least = jnp.where(log_decay > 0, jnp.inf, least)
    return jnp.concatenate([found, jnp.pad(least, padded)], axis=1)


def sums_until(x: Array, sizes: list[int]) -> Array:
    """Sums ``[N, R, S]`` up to each position, from the start of its piece.

    Products with triangles of 128 take less time than cumulative sums.

    Args:
      x: ``[N, R, S]``.
      sizes: of the pieces of each row, which divide S.
    """
    heads, rows, length = x.shape
    width = 128 if all(size % 128 == 0 for size in sizes) else min(sizes)

    def products(x: Array, past: Array) -> Array:
        return jnp.einsum("...s,st->...t", x, past, precision=jax.lax.Precision.HIGHEST)

    pieces = x.reshape(heads, rows, length // width, width)
    inside = products(pieces, jnp.triu(jnp.ones((width, width), x.dtype)))
    if max(sizes) > width:
        totals = pieces.sum(axis=-1)
        before = []
        for row, size in enumerate(sizes):
            count = size // width
            triangle = jnp.triu(jnp.ones((count, count), x.dtype), k=1)
            groups = totals[:, row].reshape(heads, -1, count)
            before.append(products(groups, triangle).reshape(heads, -1))
        inside = inside + jnp.stack(before, axis=1)[..., None]
    return inside.reshape(x.shape)


def gradient_of(program: Program, found: Array) -> Array:
    """Returns the gradient of ``log_decay``, ``[B K, 1, S]``.

    Args:
      program: choices.
      found: from the backward kernel, ``[B K, 2, S]``: see :class:`.causal_pull_back.Pulled`.
    """
    until, keys = found[:, :1], found[:, 1:]
    # Token t decays what the rows from t on read, and what the keys before t leave.
    turned = jnp.flip(until, axis=-1)
    both = sums_until(jnp.concatenate([turned, keys], axis=1), [program.chunk] * 2)
    gradient = jnp.flip(both[:, :1], axis=-1) + both[:, 1:] - keys
    return gradient[..., : program.keys]
