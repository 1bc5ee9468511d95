"""Losses of language models.

Shape letters: B batch, T length, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.models.language_model import LanguageModel


@runs_on_auto_axes
def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], counts: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean negative log-likelihood in nats of the counted targets, and their number.

    Args:
      logits: ``[B, T, V]``.
      targets: ``[B, T]``; targets that do not count may be any integers.
      counts: ``[B, T]``.

    Returns:
      float32 scalar, 0 if none counts; and the number of counted targets.
    """
    targets = jnp.where(counts, targets, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    number = jnp.sum(counts)
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(number, 1), number


@modules_run_on_auto_axes
def next_token_loss(
    model: LanguageModel,
    tokens: Int[Array, "B T"],
    *,
    ignore_index: int | None = None,
    key_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    deterministic: bool = True,
    rngs: nnx.Rngs | None = None,
    **inputs: Any,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean loss of all tokens after the first of their sequence, given the tokens before.

    Args:
      model: A causal `LanguageModel`.
      tokens: ``[B, T]``, T at least 2.
      ignore_index: Tokens that are not predicted, such as padding at the end of a sequence.
      key_mask: ``[B, T]``; positions where it is False are not attended to; they and the tokens
        after them are not predicted.
      segment_ids: ``[B, T]``; packed sequences are runs of equal ids.
      positions: ``[B, T]``, by default 0, 1, ...
      deterministic: No dropout.
      rngs: Source of dropout.
      **inputs: Further arguments of the model, such as a context.

    Returns:
      float32 scalar, in nats per token, and the number of averaged tokens.

    Raises:
      ValueError: For fewer than two tokens.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [batch, length >= 2], got {tokens.shape}.")
    counts = jnp.ones((len(tokens), tokens.shape[1] - 1), bool)
    if key_mask is not None:
        counts &= key_mask[:, 1:] & key_mask[:, :-1]
    if segment_ids is not None:
        counts &= segment_ids[:, 1:] == segment_ids[:, :-1]
    if ignore_index is not None:
        counts &= tokens[:, 1:] != ignore_index
    along = {"key_mask": key_mask, "segment_ids": segment_ids, "positions": positions}
    logits = model(
        jnp.maximum(tokens, 0)[:, :-1],
        **{name: x[:, :-1] for name, x in along.items() if x is not None},
        deterministic=deterministic,
        rngs=rngs,
        **inputs,
    )
    return cross_entropy(logits, tokens[:, 1:], counts)
