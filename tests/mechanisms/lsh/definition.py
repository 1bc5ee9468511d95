"""Hashed attention by its definition: count how often each pair meets, then one softmax."""

import jax
import jax.numpy as jnp
import numpy as np


def meetings(buckets, size, *, across=True, borders=True):
    """How often query i meets key j in a row with ``buckets [R, S]``; and how often it counts."""
    rounds, length = buckets.shape
    order = [p for r in range(rounds) for p in sorted(range(length), key=lambda p: buckets[r][p])]
    number = [r for r in range(rounds) for _ in range(length)]
    met, counted = np.zeros((length, length)), np.zeros((length, length))
    for start in range(0, rounds * length, size):
        for slot in range(start, start + size):
            for other in range(start - size, start + size):  # Negative ones are the last round's.
                i, r, j, s = order[slot], number[slot], order[other], number[other]
                if across or (r == s and buckets[r][i] == buckets[r][j]):
                    met[i, j] += 1
                    counted[i, j] += borders or r == s
    return met, counted


def attend(qk, value, met, counted=None, *, visible=True, scale=None):
    """One row: ``softmax(q k / sqrt(D))`` over all meetings, self as a last resort, in float64."""
    width = qk.shape[-1]
    key = qk / jnp.linalg.norm(qk, axis=-1, keepdims=True)
    logits = qk @ key.T * (width**-0.5 if scale is None else scale)
    itself = np.eye(len(qk), dtype=bool)
    logits = jnp.where(itself, -5e4, logits)
    if counted is not None:
        logits = logits - jnp.log(counted + 1e-9)
    logits = jnp.where((met > 0) & (visible | itself), logits, -jnp.inf)
    weights = met * jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True) @ value
