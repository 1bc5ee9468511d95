"""Shapes and types of what is given to linear attention: brought to one form, or an error."""

from __future__ import annotations

import math

import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array
from fast_attention.linear.state import LinearAttentionState


def promote_floating(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Casts the three to their common floating type."""
    dtype = jnp.result_type(query, key, value)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = at_least_float32(dtype)
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


# Biases this low stand for "masked" (-1e9, the most negative float16 and float32 are common), and
# weights exp(bias) of larger sizes could not be distinguished in float32.
LARGEST_BIAS = 1e4


def split_bias(key_bias: Array | None, key_mask: Array | None) -> tuple[Array | None, Array | None]:
    """Moves biases that stand for "masked" into the mask and limits the others."""
    if key_bias is None:
        return None, key_mask
    visible = key_bias > -LARGEST_BIAS
    key_mask = visible if key_mask is None else key_mask & visible
    return jnp.clip(key_bias, -LARGEST_BIAS, LARGEST_BIAS), key_mask


def broadcast_segments(segment_ids: Array, query: Array) -> Array:
    """Brings segment ids to ``[B, T]``, and numbers the runs: ids may come again later."""
    ids = spread_segments(segment_ids, query)
    new_run = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))[:, : ids.shape[1]]
    return jnp.cumsum(new_run, axis=1)


def spread_segments(segment_ids: Array, query: Array) -> Array:
    """Brings segment ids to ``[B, T]``."""
    shape = query.shape[:-2]
    try:
        ids = jnp.broadcast_to(segment_ids, shape)
    except ValueError as error:
        raise ValueError(
            f"segment_ids must have the shape {shape} of query without heads and width, got "
            f"{segment_ids.shape}."
        ) from error
    return ids.reshape(math.prod(shape[:-1]), shape[-1])


def per_key(x: Array | None, key: Array, name: str) -> Array | None:
    """Brings ``[*B, S]`` or ``[*B, S, K or 1]`` to ``[B, S, K or 1]``."""
    if x is None:
        return None
    shape = key.shape[:-2]
    heads = 1
    if x.ndim == len(shape) + 1:
        heads = x.shape[-1]
        target = (*shape, heads)
    elif x.ndim == len(shape):
        x, target = x[..., None], (*shape, 1)
    else:
        target = ()
    if heads not in (1, key.shape[-2]) or not target:
        raise ValueError(
            f"{name} must have shape {shape} or {(*shape, key.shape[-2])} to go with key of shape "
            f"{key.shape}, got {x.shape}."
        )
    try:
        x = jnp.broadcast_to(x, target)
    except ValueError as error:
        raise ValueError(
            f"{name} of shape {x.shape} cannot be broadcast to {target}, the leading shape of key."
        ) from error
    return x.reshape(math.prod(shape[:-1]), shape[-1], heads)


def check_shapes(
    query: Array, key: Array, value: Array, causal: bool, segment_ids: Array | None
) -> None:
    """Raises ValueError for shapes that do not fit together."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if min(query.ndim, key.ndim, value.ndim) < 3 or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            "query, key and value must all be [*B, length, heads, width] with the same number of "
            f"axes, got {shapes}."
        )
    if query.shape[:-3] != key.shape[:-3] or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "query and key must agree in their batch axes, key and value in all axes but the "
            f"last, got {shapes}."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same width, got {shapes}.")
    if any(0 in x.shape[-2:] for x in (query, key, value)):
        raise ValueError(
            f"query, key and value must have heads and widths of 1 or more, got {shapes}."
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    swapped = (
        " The layout is [*B, length, heads, width]: check that length and heads are not swapped."
        if query.shape[-3] != key.shape[-3]
        else ""
    )
    if heads % kv_heads:
        raise ValueError(
            f"The number of query heads must be a multiple of that of key heads, got {heads} and "
            f"{kv_heads} ({shapes}).{swapped}"
        )
    length, keys = query.shape[-3], key.shape[-3]
    if causal and length != keys:
        raise ValueError(
            f"Causal attention needs as many keys as queries, got {keys} and {length}. To continue "
            "a sequence pass the keys before it as initial_state; for a single query over a cache "
            "use causal=False with a key_mask."
        )
    if segment_ids is not None and length != keys:
        raise ValueError(
            f"segment_ids are for self-attention, but there are {length} queries and {keys} keys; "
            "use a key_mask."
        )


def is_empty(query: Array, key: Array) -> bool:
    """Whether no query attends, or none sees a key: the batch or a sequence is empty."""
    return 0 in query.shape[:-2] or 0 in key.shape[:-2]


def empty_output(query: Array, value: Array) -> Array:
    """Returns ``[*B, T, H, V]`` of queries that see no key: zeros, if there are any."""
    return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)


def check_state(
    state: LinearAttentionState, batch_shape: tuple[int, ...], key: Array, value: Array
) -> None:
    """Raises ValueError for a state that does not go with the keys and values."""
    expected = (*batch_shape, key.shape[-2], value.shape[-1])
    if state.kv.shape[:-1] != expected:
        raise ValueError(
            f"initial_state.kv must have shape {(*expected, 'M')} to go with key {key.shape} and "
            f"value {value.shape}, got {state.kv.shape}."
        )
