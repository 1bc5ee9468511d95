"""Sampling a token from logits: filters (pure functions of logits) and the sampler.

A removed token has logit ``-inf``. Filters are independent for each row, keep removed tokens
removed, and can be combined in any order; the usual order is temperature (by division), forbidden
tokens, repetition penalty, top-k, top-p, sampling.

Shape letters: B batch, V tokens, W previous tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Float, Int


def apply_repetition_penalty(
    logits: Float[Array, "*B V"],
    history: Int[Array, "*B W"],
    penalty: float | int | Array,
    valid: Bool[Array, "*B W"] | None = None,
    normalize: bool = False,
) -> Float[Array, "*B V"]:
    """Makes previous tokens less likely, independent of how often they occurred.

    Positive logits are divided by the penalty, others multiplied, so that a penalty above 1 lowers
    a logit of either sign.

    Args:
      logits: float ``[*B, V]``.
      history: previous tokens of each row; ids outside ``0 .. V - 1`` are ignored.
      penalty: positive; 1 changes nothing, below 1 favours repetition.
      valid: which entries of ``history`` to use; None means all.
      normalize: whether to convert logits to log-probabilities first, so that adding a constant to
        all logits of a row has no effect.

    Raises:
      ValueError: if the penalty is not positive.

    References:
      Keskar et al. CTRL. arXiv:1909.05858, section 4.1 (there for positive logits).
    """
    if isinstance(penalty, (int, float)) and not penalty > 0:
        raise ValueError(f"repetition penalty must be positive, but got {penalty}.")
    if normalize:
        logits = jax.nn.log_softmax(logits)
    is_token = history[..., None] == jnp.arange(logits.shape[-1]).reshape(
        (1,) * history.ndim + (-1,)
    )
    if valid is not None:
        is_token &= valid[..., None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(is_token.any(-2), penalised, logits)


def forbid_tokens(logits: Float[Array, "*B V"], ids: Sequence[int]) -> Float[Array, "*B V"]:
    """Removes some tokens from every row.

    Args:
      logits: float ``[*B, V]``.
      ids: the tokens; with no ids, logits do not change.

    Raises:
      ValueError: if an id is not in ``0 .. V - 1``, or no token would be left.
    """
    size = logits.shape[-1]
    outside = [token for token in ids if not 0 <= token < size]
    if outside or len(set(ids)) >= size:
        raise ValueError(
            f"forbidden tokens must be some, not all, of 0 .. {size - 1}, but got {list(ids)}."
        )
    forbidden = jnp.zeros(size, bool).at[jnp.asarray(ids, jnp.int32)].set(True)
    return jnp.where(forbidden.reshape((1,) * (logits.ndim - 1) + (-1,)), -jnp.inf, logits)


def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """Keeps the k most likely tokens of each row, and ties with the last of them.

    Args:
      logits: float ``[*B, V]``.
      k: at least 1; V or more keeps all.

    Raises:
      ValueError: if k is less than 1.
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, but got {k}; None keeps all tokens.")
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "*B V"], p: float | int | Array) -> Float[Array, "*B V"]:
    """Keeps the fewest most likely tokens with a total probability of at least p.

    Ties with the last of them are also kept; the most likely token is always kept.

    Args:
      logits: float ``[*B, V]``.
      p: the mass to keep, in (0, 1]; 1 keeps all.

    Raises:
      ValueError: if p is not in (0, 1].

    References:
      Holtzman et al. The curious case of neural text degeneration. arXiv:1904.09751.
    """
    if isinstance(p, (int, float)) and not 0 < p <= 1:
        raise ValueError(f"top_p is the mass to keep, in (0, 1], but got {p}.")
    descending = jnp.sort(logits, axis=-1, descending=True)
    mass = jax.nn.softmax(descending.astype(jnp.float32))
    # What precedes a token decides, so that the first stays; a rounded sum never drops at p = 1.
    needed = (jnp.cumsum(mass, axis=-1) - mass < p) | (p >= 1)
    least = jnp.where(needed, descending, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def sample_token(
    key: Array, logits: Float[Array, "*B V"], temperature: float | int | Array = 1.0
) -> Int[Array, "*B"]:
    """Samples a token for each row from ``softmax(logits / temperature)``.

    Args:
      key: a random key; equal keys give equal tokens.
      logits: float ``[*B, V]``, at least one of each row finite.
      temperature: at least 0; 0 takes the most likely token (the first of ties).

    Returns:
      int32 ``[*B]``.

    Raises:
      ValueError: if the temperature is negative.
    """
    if isinstance(temperature, (int, float)) and not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, but got {temperature}.")
    greedy = jnp.argmax(logits, axis=-1)
    scale = jnp.where(temperature > 0, temperature, 1)
    drawn = jax.random.categorical(key, logits.astype(jnp.float32) / scale)
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
