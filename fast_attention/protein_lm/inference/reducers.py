"""From vectors of tokens to one vector of a sequence, under the names of Google's protein_lm.

Shape letters: B sequences, T length, M width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.protein_lm.data.domains import DiscreteDomain, make_protein_domain


def sum_reducer(embedding: Any, mask: Any) -> jax.Array:
    """The sum [B, M] of vectors [B, T, M] where `mask` [B, T] is 1."""
    return jnp.sum(jnp.where(_kept(mask), embedding, 0.0), axis=1)


def mean_reducer(embedding: Any, mask: Any) -> jax.Array:
    """The mean [B, M] of vectors [B, T, M] where `mask` [B, T] is 1; zero if that is nowhere."""
    number = jnp.sum(_kept(mask), axis=1)
    return sum_reducer(embedding, mask) / jnp.maximum(number, 1)


def max_reducer(embedding: Any, mask: Any) -> jax.Array:
    """The largest entries [B, M] of vectors [B, T, M] where `mask` [B, T] is 1.

    They are minus infinity if that is nowhere.
    """
    return jnp.max(jnp.where(_kept(mask), embedding, -jnp.inf), axis=1)


def masked_reduce_fn(
    embedding: Any,
    inputs: Any,
    reducer_fn: Callable[[Any, Any], Any] = mean_reducer,
    domain: DiscreteDomain | None = None,
    ignore_eos: bool = False,
    ignore_bos: bool = True,
    ignore_pad: bool = True,
    ignore_mask: bool = True,
) -> jax.Array:
    """Reduces the vectors of a sequence without those at some special tokens.

    Args:
      embedding: Vectors [B, T, M].
      inputs: The tokens [B, T] at the same positions.
      reducer_fn: From vectors and a mask to one vector, such as `mean_reducer`.
      domain: Says which ids are special; None is `make_protein_domain`.
      ignore_eos: Whether to leave out end tokens.
      ignore_bos: Whether to leave out begin tokens.
      ignore_pad: Whether to leave out padding tokens.
      ignore_mask: Whether to leave out mask tokens.
    """
    vocab = (make_protein_domain() if domain is None else domain).vocab
    ignored = {
        vocab.eos: ignore_eos,
        vocab.bos: ignore_bos,
        vocab.pad: ignore_pad,
        vocab.mask: ignore_mask,
    }
    inputs = jnp.asarray(inputs)
    kept = jnp.ones(inputs.shape, bool)
    for token, ignore in ignored.items():
        if ignore and token is not None:
            kept &= inputs != token
    return reducer_fn(embedding, kept)


def _kept(mask: Any) -> jax.Array:
    return jnp.asarray(mask, bool)[..., None]
