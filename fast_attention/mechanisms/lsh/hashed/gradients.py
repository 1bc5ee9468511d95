"""All rounds of one row, backward: weights are computed again, block by block.

Since the rounds together are one softmax, the gradients are those of plain attention: with weights
P, outputs O and cotangents dO, ``dV = P^T dO``, and ``dL = P * (dO V^T - <dO, O>)`` of logits L.

Shape letters: S length, D head width, V value width, G chunks in a round, C chunk, W = 2 C.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Float
from fast_attention.mechanisms.lsh.hashed.rounds import (
    Row,
    Sums,
    finite,
    kept,
    scores_of,
    windows_of,
)
from fast_attention.mechanisms.lsh.hashed.scores import Choices
from fast_attention.mechanisms.lsh.hashed.windows import Windows, fold_key, rows_at, unsort


def pull_back_rounds(
    row: Row,
    out: Float[Array, "S V"],
    sums: Sums,
    cotangent: Float[Array, "S V"],
    choices: Choices,
) -> tuple[Float[Array, "S D"], Float[Array, "S D"], Float[Array, "S V"]]:
    """Finds the gradients of queries, keys and values.

    Args:
      row: as it was attended.
      out: its output.
      sums: weight and largest of what `attend_rounds` returned; ``value`` is not used.
      cotangent: of the output.
      choices: as they were.

    Returns:
      Gradients of query, key and value, float32 at least.
    """
    scores = scores_of(row, choices)
    size, compute = choices.size, at_least_float32(row.query.dtype)
    product = functools.partial(
        jnp.einsum, precision=choices.precision, preferred_element_type=compute
    )
    # exp(logit - largest) is the weight up to its sum, by which the cotangent is divided instead.
    cotangent = cotangent.astype(compute) / jnp.where(sums.weight == 0, 1, sums.weight)[:, None]
    inner = jnp.sum(cotangent * out.astype(compute), axis=-1)
    cotangent, largest = cotangent.astype(row.value.dtype), finite(sums.largest)

    def pull_back_block(key: Array | None, operands: tuple[Windows, Array]):
        window, number = operands
        own = window.position[:, :size]
        query, keys, logits, itself = scores(window)
        weights = jnp.exp(logits - rows_at(largest, own)[..., None])
        d_out, values = rows_at(cotangent, own), rows_at(row.value, window.position)
        d_weights = product("ecv,ewv->ecw", d_out, values)
        used, factors = weights, kept(fold_key(key, number), weights, choices)
        if factors is not None:
            factors = factors.astype(weights.dtype)
            used, d_weights = weights * factors, d_weights * factors
        d_value = product("ecw,ecv->ewv", used.astype(d_out.dtype), d_out)
        d_logits = weights * (d_weights - rows_at(inner, own)[..., None])
        d_logits = jnp.where(itself, 0, d_logits).astype(query.dtype)
        d_query = product("ecw,ewd->ecd", d_logits, keys)
        d_key = product("ecw,ecd->ewd", d_logits, query)
        return d_query, d_key, d_value

    def pull_back_round(gradients, operands: tuple[Windows, Array, Array]):
        windows, slot, number = operands
        key = fold_key(row.dropout_key, number)
        blocks = (windows, jnp.arange(len(windows.position)))
        d_query, d_key, d_value = lax.map(functools.partial(pull_back_block, key), blocks)
        before = windows.position[0, 0, size:]
        chunks = slot.shape[0] // size

        def of_keys(total: Array, found: Array) -> Array:
            """Adds what a chunk got from its own queries and from those of the chunk behind."""
            found = found.reshape(-1, *found.shape[2:])[:chunks]
            own, previous = found[:, :size], found[:, size:]
            behind = jnp.concatenate([previous[1:], jnp.zeros_like(previous[:1])])
            total = total + rows_at((own + behind).reshape(-1, found.shape[-1]), slot)
            # The keys before the first chunk are those of another round.
            return total.at[before].add(previous[0], mode="promise_in_bounds", unique_indices=True)

        return (
            gradients[0] + unsort(d_query, slot),
            of_keys(gradients[1], d_key),
            of_keys(gradients[2], d_value),
        ), None

    start = tuple(jnp.zeros(x.shape, compute) for x in (row.query, row.key, row.value))
    start = vary_alike(start, row, cotangent)
    rounds = jnp.arange(len(row.order.slot))
    operands = (windows_of(row, choices), row.order.slot, rounds)
    d_query, d_key, d_value = lax.scan(pull_back_round, start, operands)[0]
    return d_query * choices.scale, d_key * choices.scale, d_value
