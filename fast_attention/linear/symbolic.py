"""Lengths that are known only when an exported program runs (``jax.export.symbolic_shape``).

A loop over chunks needs whole chunks there: sequences are padded to a multiple of the chunk, and
the padding is masked. Concrete lengths are never padded.

Shape letters: B batch, T queries, S keys, C chunk.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import export

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.chunk_choice import planned_chunk
from fast_attention.linear.types import Inputs, Plan


def is_symbolic(length: Any) -> bool:
    """Whether a length is known only when the program runs."""
    return export.is_symbolic_dim(length)


def smaller(size: int, length: Any) -> int:
    """Returns the smaller one; `size` for a symbolic length, which is a multiple of it."""
    return size if is_symbolic(length) else min(size, length)


def pad_symbolic(plan: Plan, inputs: Inputs) -> Inputs:
    """Pads axes of symbolic length to whole chunks; the new keys are masked.

    Args:
      plan: decides the chunk.
      inputs: of any lengths; returned as they are if all of them are known.
    """
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    if not (is_symbolic(queries) or is_symbolic(keys)):
        return inputs
    chunk = planned_chunk(plan, inputs).chunk_size

    def padded(x: Array | None) -> Any:
        if x is None or not is_symbolic(x.shape[1]):
            return x
        # In this form jax proves that the new length is a multiple of the chunk.
        length = (x.shape[1] + chunk - 1) // chunk * chunk
        # The last position is repeated: segments end where they did.
        return jnp.take(x, jnp.minimum(jnp.arange(length), x.shape[1] - 1), axis=1)

    mask, log_decay = inputs.key_mask, padded(inputs.log_decay)
    if is_symbolic(keys):
        mask = jnp.ones((inputs.key.shape[0], keys, 1), bool) if mask is None else mask
        mask = padded(mask)
        inside = jnp.arange(mask.shape[1]) < keys
        mask = mask & inside[None, :, None]
        if log_decay is not None:
            log_decay = jnp.where(inside[None, :, None], log_decay, 0)
    return inputs._replace(
        query=padded(inputs.query),
        key=padded(inputs.key),
        value=padded(inputs.value),
        key_mask=mask,
        key_bias=padded(inputs.key_bias),
        segment_ids=padded(inputs.segment_ids),
        log_decay=log_decay,
    )
