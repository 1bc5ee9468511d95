"""Decay: the state before a token is multiplied by ``exp(log_decay)`` of that token.

Shape letters: B batch, T length, K key/value heads.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from fast_attention.arrays.types import Array

LOWEST_DECAY = -1e4
"""Lower ones, minus infinity included, are taken for this one: everything before is forgotten."""


def decay_of_tokens(
    log_decay: Array | None, key: Array, key_mask: Array | None, *, causal: bool, dtype: Any
) -> Array | None:
    """Brings ``[*B, T, K]`` or ``[K]`` to ``[B, T, K]``; masked positions do not decay.

    Args:
      log_decay: as given to :func:`~fast_attention.linear_attention`.
      key: ``[*B, T, K, D]``.
      key_mask: ``[B, T, K or 1]`` or None.
      causal: whether there is an order in which tokens come.
      dtype: of the computation.

    Raises:
      ValueError: for another shape, or for attention both ways.
    """
    if log_decay is None:
        return None
    if not causal:
        raise ValueError(
            "log_decay needs causal attention: pass causal=True, or leave log_decay out."
        )
    shape = key.shape[:-1]
    spread = spread_decay(log_decay, shape, f"key {key.shape}").astype(dtype)
    spread = spread.reshape(math.prod(shape[:-2]), *shape[-2:])
    return spread if key_mask is None else jnp.where(key_mask, spread, 0)


def spread_decay(log_decay: Array, shape: tuple[int, ...], beside: str) -> Array:
    """Brings ``[*B, T, K]`` or ``[K]`` to a shape, and limits it from below.

    Args:
      log_decay: the logarithms of the factors.
      shape: that of the keys without their width.
      beside: what has this shape, for the message.

    Raises:
      ValueError: for another shape.
    """
    given = jnp.shape(log_decay)
    if given not in (shape, shape[-1:]) or not jnp.issubdtype(
        jnp.result_type(log_decay), jnp.floating
    ):
        raise ValueError(
            f"log_decay must be floating numbers of shape {shape}, or {shape[-1:]} for one decay "
            f"per key head, to match {beside}, got {jnp.result_type(log_decay)} of shape {given}."
        )
    return jnp.broadcast_to(jnp.maximum(log_decay, LOWEST_DECAY), shape)
