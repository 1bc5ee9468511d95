"""Matrix products of features, weights and values, in the type of the inputs where accurate.

Shape letters: as in the subscripts given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.types import Inputs, Plan

Einsum = Callable[..., Array]
"""``einsum(subscripts, left, right)``; with ``rounded=False`` never in bfloat16."""

sums = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
"""Sums of weights and their gradients, never rounded."""


def einsum_of(plan: Plan, inputs: Inputs) -> Einsum:
    """Returns the products of one call.

    For bfloat16 inputs operands are rounded to bfloat16 (features are at most 1, and their range is
    that of float32) and products accumulated in float32, unless ``plan.precision`` asks for more.
    float16 has too small a range for weights inside a chunk: its products are those of float32.
    Exponents, maxima and :data:`sums` are never rounded.
    """
    default = plan.precision in (None, "default", jax.lax.Precision.DEFAULT)
    low = default and inputs.query.dtype == jnp.bfloat16

    def einsum(subscripts: str, *operands: Array, rounded: bool = True) -> Array:
        if low and rounded:
            operands = tuple(x.astype(jnp.bfloat16) for x in operands)
        return jnp.einsum(
            subscripts,
            *operands,
            precision=plan.precision,
            preferred_element_type=inputs.state.kv.dtype,
        )

    return einsum
