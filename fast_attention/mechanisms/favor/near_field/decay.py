"""Decay of keys that are near for a while, and far from then on.

Shape letters: B batch, S keys, K key/value heads.
"""

from __future__ import annotations

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.types import Inputs


def bias_of_far_keys(inputs: Inputs, distance: int) -> Array | None:
    """Returns the bias with which keys become far, ``[B, S - distance, K]``; None without decay.

    A key becomes far `distance` positions behind its own. The state into which it goes has decayed
    until there, and so must the key: by the sum of the decays of the tokens after it.
    """
    if inputs.log_decay is None:
        return None
    until = _window_sums(inputs.log_decay[:, 1:], distance)
    return until if inputs.key_bias is None else until + inputs.key_bias[:, : until.shape[1]]


def _window_sums(x: Array, size: int) -> Array:
    """Sums every `size` consecutive positions of ``[B, N, K]``: ``[B, N - size + 1, K]``.

    Sums of 1, 2, 4 ... positions are added: differences of cumulative sums would round.
    """
    count = x.shape[1] - size + 1
    total, done, power = jnp.zeros_like(x[:, :count]), 0, 1
    while done < size:
        if size & power:
            total, done = total + x[:, done : done + count], done + power
        if done < size:
            x, power = x[:, :-power] + x[:, power:], 2 * power
    return total
