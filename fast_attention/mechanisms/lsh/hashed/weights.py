"""The weights of hashed attention as a matrix, to look at.

Shape letters: N rows (batch x heads), S length, W keys of a chunk.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Float
from fast_attention.mechanisms.lsh.hashed.core import Shared, map_rows, row_of
from fast_attention.mechanisms.lsh.hashed.rounds import finite, scores_of, windows_of
from fast_attention.mechanisms.lsh.hashed.scores import Choices
from fast_attention.mechanisms.lsh.hashed.windows import Windows, rows_at


def dense_weights(
    query: Float[Array, "N S D"],
    key: Float[Array, "N S D"],
    weight: Float[Array, "N S"],
    largest: Float[Array, "N S"],
    shared: Shared,
    choices: Choices,
) -> Float[Array, "N S S"]:
    """Adds up the weights of each pair over all rounds, before dropout; without gradients.

    Args:
      query: ``[N, S, D]``.
      key: ``[N, S, D]``.
      weight: sums of weights, from :func:`fast_attention.mechanisms.lsh.hashed.core.attend_sorted`.
      largest: logits, from the same.
      shared: as given to it.
      choices: as given to it.

    Returns:
      ``[N, S, S]``; rows sum to one, or to zero for a query that sees nothing.
    """

    def fill(query: Array, key: Array, weight: Array, largest: Array, n: Array) -> Array:
        row = row_of(query, key, query, shared, n, choices)
        scores, windows = scores_of(row, choices), windows_of(row, choices)
        length, chunks = len(query), row.order.slot.shape[1] // choices.size
        # Windows that only fill up a block are no chunks: what they would add is left out.
        number = jnp.arange(windows.position[0, :, :, 0].size).reshape(windows.position.shape[1:3])

        def add_block(matrix: Array, operands: tuple[Windows, Array]):
            window, number = operands
            own = window.position[:, : choices.size]
            logits = scores(window)[2] - finite(rows_at(largest, own))[..., None]
            added = jnp.exp(logits) / jnp.where(weight == 0, 1, weight)[own][..., None]
            added = jnp.where((number < chunks)[:, None, None], added, 0)
            pairs = (own[:, :, None], window.position[:, None, :])
            return matrix.at[pairs].add(added, mode="promise_in_bounds"), None

        def add_round(matrix: Array, windows: Windows):
            return lax.scan(add_block, matrix, (windows, number))[0], None

        start = vary_alike(jnp.zeros((length, length), weight.dtype), row, weight)
        return lax.scan(add_round, start, windows)[0]

    operands = tuple(lax.stop_gradient(x) for x in (query, key, weight, largest))
    return map_rows(fill, operands, choices.rows)
