"""Decay in the TPU kernels: factors inside a chunk, undecayed units, and what must be checked.

Token t multiplies the state before it by ``exp(d_t)``. With ``L_t``, the sum of d over the tokens
of a chunk up to t, the weight of key s for row t of the chunk has the factor ``exp(L_t - L_s)``;
what row t reads from the state before the chunk has ``exp(L_t)``; and in the state after the chunk
of C tokens, the state before it has ``exp(L_C)`` and key s ``exp(L_C - L_s)``. For ``s <= t`` these
are exponentials of sums of d: at most 1 if no d is positive, whatever their size.

A decay does not depend on the feature, so that the scale of the features (:mod:`.causal_forward`)
need not move with it inside a block: after a block it is set to the size of what the state holds.
That is right as long as what rows and state hold is not far below the scale. Rows and states are
therefore checked: a row with a denominator below :data:`.decay_rows.LEAST_ROW`, a state with a sum
of features below :data:`.decay_rows.LEAST_STATE`, and any positive d make the kernel compute the
block again, from that row on, in *undecayed units*: key s has the factor ``exp(-L_s)``, and rows
and states have none, because a factor of a whole row cancels. Then only keys grow, and the rules
for keys that exceed the scale hold as without decay.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu import program as pr
from fast_attention.linear.pallas_tpu.decay_rows import (
    KEPT,
    LEAST_STATE,
    num_rows,
    read_rows,
)
from fast_attention.linear.pallas_tpu.program import EXTRA, Program


class Factors(NamedTuple):
    """Factors of a chunk of one head.

    Attributes:
      rows: L of each position in one or two parts, ``[1, C]``.
      columns: the same, ``[C, 1]``.
      before: ``exp(L_t)``, ``[1, C]``.
      left: ``exp(L_C - L_s)``, ``[1, C]``.
      whole: ``exp(L_C)``, ``[1, 1]``.
    """

    rows: list[Array]
    columns: list[Array]
    before: Array
    left: Array
    whole: Array

    def pairs(self, program: Program) -> Array:
        """Returns the factors of pairs, ``[C, C]``, keys first; for keys up to the row."""
        return _bounded(program, _between(self.rows, self.columns), 0)

    def turned(self, program: Program) -> Array:
        """Returns the same, rows first."""
        return _bounded(program, _between(self.columns, self.rows), 1)

    def before_columns(self) -> Array:
        """Returns :attr:`before` as a column."""
        return jnp.exp2(sum(self.columns[1:], self.columns[0]))

    def left_columns(self) -> Array:
        """Returns :attr:`left` as a column."""
        return jnp.exp2(_between(_last(self.rows), self.columns))


def _bounded(program: Program, over: Array, key_axis: int) -> Array:
    """Returns ``exp2(over)``; for keys behind the row any finite number."""
    if program.exponential:  # With a positive decay, rows are computed again.
        return jnp.exp2(-jnp.abs(over))
    return jnp.exp2(jnp.where(pr.seen_pairs(program, key_axis), over, 0))


def _between(later: list[Array], earlier: list[Array]) -> Array:
    parts = [x - y for x, y in zip(later, earlier, strict=True)]
    return sum(parts[1:], parts[0])


def _last(rows: list[Array]) -> list[Array]:
    return [x[:, -1:] for x in rows]


def factors(program: Program, operands: Any, h: Any, piece: slice) -> Factors:
    """Returns the factors of a chunk, inside a kernel."""
    rows = [operands.decay[h, i : i + 1, piece] for i in range(read_rows(program))]
    last = _last(rows)
    return Factors(
        rows=rows,
        columns=[pr.transpose(x) for x in rows],
        before=jnp.exp2(sum(rows[1:], rows[0])),
        left=jnp.exp2(_between(last, rows)),
        whole=jnp.exp2(sum(last[1:], last[0])),
    )


class Sums(NamedTuple):
    """What factors of a chunk multiply, times its cotangent, summed; see :class:`.Pulled`.

    Attributes:
      rows: over keys, ``[1, C]``.
      columns: over features and less over rows, ``[C, 1]``.
    """

    rows: Array
    columns: Array

    @classmethod
    def empty(cls, program: Program) -> Sums:
        """Returns sums of nothing."""
        zeros = jnp.zeros((1, program.chunk), jnp.float32)
        return cls(zeros, jnp.zeros((program.chunk, 1), jnp.float32))

    def add(self, program: Program, pairs: Array, read: Array) -> Sums:
        """Adds the rows of a query head.

        Args:
          program: choices.
          pairs: weights times cotangents, keys first, ``[C, C]``.
          read: features times cotangents of what is read from the state, ``[C, M]``.
        """
        # A key has not decayed for its own row.
        others = pr.seen_pairs(program) & jnp.logical_not(_own_pairs(program))
        pairs = jnp.where(others, pairs, 0)
        columns = jnp.sum(read, axis=1, keepdims=True) - jnp.sum(pairs, axis=1, keepdims=True)
        return Sums(
            self.rows + jnp.sum(pairs, axis=0, keepdims=True),
            self.columns + columns,
        )

    def rows_of(self, program: Program, kept: Array, whole: Array) -> Array:
        """Returns the rows of :attr:`.Pulled.decay`, ``[2, C]``.

        Args:
          program: choices.
          kept: features of keys times cotangents of what is left of them, ``[C, M]``.
          whole: of the state, ``[1, 1]``.
        """
        lane = jax.lax.broadcasted_iota(jnp.int32, (program.chunk, 128), 1)
        kept = jnp.sum(kept, axis=1, keepdims=True)
        columns = jnp.where(lane == 0, self.columns, jnp.where(lane == 1, kept, 0))
        both = jnp.transpose(columns)[:2]
        row = jax.lax.broadcasted_iota(jnp.int32, both.shape, 0)
        at = jax.lax.broadcasted_iota(jnp.int32, both.shape, 1)
        more = self.rows + jnp.where(at == program.chunk - 1, whole, 0)
        return both + jnp.where(row == 0, more, 0)


def _own_pairs(program: Program) -> Array:
    shape = (program.chunk, program.chunk)
    at = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2)]
    return at[0] == at[1]


class Since(NamedTuple):
    """The sum of decays in the block up to a token, in two parts, ``[1, 1]``."""

    coarse: Array
    rest: Array


def block_start() -> Since:
    """Returns the sum before the first token of a block."""
    return Since(*[jnp.zeros((1, 1), jnp.float32)] * 2)


def sum_until(program: Program, operands: Any, h: Any, position: Array) -> Since:
    """Returns the sum up to a token of the block, which is included."""
    first = read_rows(program)
    at = jax.lax.broadcasted_iota(jnp.int32, (1, program.block), 1)
    return Since(
        *(
            jnp.sum(
                jnp.where(at == position, operands.decay[h, i : i + 1, :], 0), axis=1, keepdims=True
            )
            for i in (first, first + 1)
        )
    )


def undecayed(program: Program, operands: Any, h: Any, piece: slice, since: Since) -> Array:
    """Returns what is added to the logs of keys in undecayed units, ``[1, C]``."""
    first = read_rows(program)
    coarse, rest = (operands.decay[h, i : i + 1, piece] for i in (first, first + 1))
    return (since.coarse - coarse) + (since.rest - rest)


def between(later: Since, earlier: Since) -> Array:
    """Returns the sum of the decays between two tokens, ``[1, 1]``."""
    return (later.coarse - earlier.coarse) + (later.rest - earlier.rest)


def fading_values(program: Program, value: Array, found: Factors | None) -> Array:
    """Returns ``[V + 16, C]``: what is left of values and a row of ones after the chunk."""
    if found is None:
        return pr.with_ones(program, value)
    zeros = jnp.zeros((EXTRA - 1, value.shape[1]), jnp.float32)
    rows = [value.astype(jnp.float32) * found.left, found.left, zeros]
    return jnp.concatenate(rows, axis=0).astype(program.operand)


def on_own_scale(program: Program, kv: Array, scale: Array) -> tuple[Array, Array]:
    """Moves the scale of a state, ``[1, M]``, to what its sums of features are, where far off."""
    k_sum = kv[program.value_dim : program.value_dim + 1]
    size = jnp.round(jnp.log2(jnp.where(k_sum > 0, k_sum, 1)))
    moved = jnp.where(jnp.abs(size) > KEPT, scale + size, scale)
    return kv * jnp.exp2(scale - moved), moved


def least(program: Program, operands: Any, h: Any, piece: slice) -> Array:
    """Returns the least denominators of rows, ``[1, C]``."""
    last = num_rows(program) - 1
    return operands.decay[h, last : last + 1, piece]


def too_small(program: Program, operands: Any, h: Any, head: Any) -> Array:
    """Returns a row that is above 0 where rows or the state of a block are too small, ``[1, N]``.

    Args:
      program: choices.
      operands: refs of a block.
      h: the head.
      head: what :func:`.causal_forward.attend_block` returned for it.
    """
    bad = jnp.zeros((1, program.chunk), jnp.float32)
    for (_, c), row in head.rows.items():
        denominator = row[program.value_dim : program.value_dim + 1]
        short = denominator < least(program, operands, h, program.chunks()[c])
        bad = jnp.maximum(bad, jnp.where(short, 1.0, 0.0))
    alive = jnp.max(least(program, operands, h, slice(0, program.block)), axis=1, keepdims=True) > 0
    k_sum = head.kv[program.value_dim : program.value_dim + 1]
    lost = pr.where(pr.lane_mask(program), jnp.where((k_sum < LEAST_STATE) & alive, 1.0, 0.0))
    return jnp.maximum(jnp.max(bad, axis=1, keepdims=True), jnp.max(lost, axis=1, keepdims=True))


def first_too_small(program: Program, operands: Any, h: Any, head: Any) -> Array:
    """Returns the first row of a block whose denominator is too small, or L."""
    found = jnp.int32(program.block)
    for (_, c), row in head.rows.items():
        piece = program.chunks()[c]
        denominator = row[program.value_dim : program.value_dim + 1]
        at = pr.columns(program, piece, jnp.int32(0))
        short = denominator < least(program, operands, h, piece)
        found = jnp.minimum(found, jnp.min(jnp.where(short, at, program.block)))
    return found
