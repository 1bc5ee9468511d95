"""Hashed attention in sorted chunks, row after row, with its own gradient.

Nothing is kept for the gradient but the inputs, the output and two numbers for each query.

Shape letters: N rows (batch x heads), S length, D head width, V value width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.types import Array, Float
from fast_attention.mechanisms.lsh.hashed.gradients import pull_back_rounds
from fast_attention.mechanisms.lsh.hashed.rounds import Row, Sums, attend_rounds
from fast_attention.mechanisms.lsh.hashed.scores import Choices, Restrictions
from fast_attention.mechanisms.lsh.hashed.sorting import Order
from fast_attention.mechanisms.lsh.hashed.windows import fold_key


class Shared(NamedTuple):
    """What rows have in common, and what needs no gradient.

    Attributes:
      order: ``[N, ..]``.
      restrictions: ``[B or 1, ..]``; the mask ``[B or 1, H or 1, S, S]`` or None.
      dropout_key: random key or None.
    """

    order: Order
    restrictions: Restrictions
    dropout_key: Array | None


def row_of(
    query: Array, key: Array, value: Array, shared: Shared, n: Array, choices: Choices
) -> Row:
    """The row with number n; the first three arrays are its own, `shared` is that of all."""
    restrictions = shared.restrictions

    def pick(x: Array, number: Array) -> Array:
        return x[number if len(x) > 1 else 0]

    element, head = n // choices.heads, n % choices.heads
    mask = restrictions.mask
    return Row(
        query,
        key,
        value,
        Order(*(x[n] for x in shared.order)),
        Restrictions(
            *(pick(x, element) for x in restrictions[:3]),
            mask=None if mask is None else pick(pick(mask, element), head),
        ),
        shared.dropout_key if choices.share_dropout else fold_key(shared.dropout_key, n),
    )


def map_rows(function: Callable[..., Any], operands: tuple[Any, ...], rows: int) -> Any:
    """Maps over the first axis, so many rows at once; the last argument is the row's number."""
    number = len(jax.tree.leaves(operands)[0])
    operands = (*operands, jnp.arange(number))
    if rows >= number:
        return jax.vmap(function)(*operands)
    return lax.map(lambda row: function(*row), operands, batch_size=None if rows == 1 else rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_sorted(
    query: Float[Array, "N S D"],
    key: Float[Array, "N S D"],
    value: Float[Array, "N S V"],
    shared: Shared,
    choices: Choices,
) -> tuple[Float[Array, "N S V"], Float[Array, "N S"], Float[Array, "N S"]]:
    """Attends.

    Args:
      query: ``[N, S, D]``.
      key: ``[N, S, D]``, of unit length.
      value: ``[N, S, V]``.
      shared: see there.
      choices: see there.

    Returns:
      ``[N, S, V]``, float32 at least, zeros for a query that sees nothing; and, without gradients,
      the sums of weights and the largest logits, ``[N, S]``.
    """
    return _forward(query, key, value, shared, choices)[0]


def attend_plainly(
    query: Array, key: Array, value: Array, shared: Shared, choices: Choices
) -> tuple[Array, Array, Array]:
    """Computes the same as :func:`attend_sorted`, to be differentiated by JAX, in either mode."""
    return _forward(query, key, value, shared, choices)[0]


def _forward(query: Array, key: Array, value: Array, shared: Shared, choices: Choices):
    def attend(query: Array, key: Array, value: Array, n: Array):
        sums = attend_rounds(row_of(query, key, value, shared, n, choices), choices)
        weight = jnp.where(sums.weight == 0, 1, sums.weight)
        return sums.value / weight[:, None], sums.weight, sums.largest

    found = map_rows(attend, (query, key, value), choices.rows)
    return found, (query, key, value, shared, *found)


def _backward(choices: Choices, saved: tuple[Any, ...], cotangents: tuple[Array, Array, Array]):
    query, key, value, shared, out, weight, largest = saved

    def pull_back(query, key, value, out, weight, largest, cotangent, n):
        row = row_of(query, key, value, shared, n, choices)
        found = pull_back_rounds(row, out, Sums(out, weight, largest), cotangent, choices)
        return [x.astype(y.dtype) for x, y in zip(found, row[:3], strict=True)]

    operands = (query, key, value, out, weight, largest, cotangents[0])
    return *map_rows(pull_back, operands, choices.rows), None


attend_sorted.defvjp(_forward, _backward)
