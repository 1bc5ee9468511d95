"""What a layer does for one group of heads around its attention function.

Shape letters: B batch, T length, S keys, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array
from fast_attention.layers.attention.config import HeadGroup
from fast_attention.layers.positions import rotate


def read_keys(
    group: HeadGroup, state: Any, key: Array, value: Array, options: dict[str, Any]
) -> Any:
    """The state after keys that nothing is asked of."""
    query = jnp.zeros((*key.shape[:2], group.num_heads, key.shape[-1]), key.dtype)
    return group.attention_fn.prefill(state, query, key, value, **options)[1]


def rotated(
    group: HeadGroup, query: Array, key: Array, positions: Array | None
) -> tuple[Array, Array]:
    """Rotates queries and their keys; keys behind these have no place in the order."""
    if group.rotary is None:
        return query, key
    if positions is None:
        raise ValueError("Rotary positions need positions=, the place of every token.")
    turn = functools.partial(rotate, base=group.rotary_base, interleaved=group.rotary == "pairs")
    length = query.shape[-3]
    turned = turn(query, positions + group.query_offset)
    if query.ndim == 4 and key.shape[1] > length:
        own = turn(key[:, :length], positions)
        return turned, jnp.concatenate([own, key[:, length:]], axis=1)
    return turned, turn(key, positions)


def dropout_options(group: HeadGroup, deterministic: bool, rngs: nnx.Rngs | None) -> dict[str, Any]:
    """What an attention function is told of dropout."""
    if deterministic or not group.dropout_rate or rngs is None:
        return {}
    return {
        "dropout_rng": rngs.dropout(),
        "dropout_rate": group.dropout_rate,
        "broadcast_dropout": False,
        "deterministic": False,
    }
