"""The Performer layer of TensorFlow's Keras by its keywords (github.com/xl402/performer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fast_attention.layers.attention.multi_axis import MultiAxisAttention
from fast_attention.mechanisms.favor.factories import make_fast_softmax_attention


def MultiHeadAttention(
    attention_method: str = "quadratic",
    supports: int | None = None,
    scaling: float = 0,
    *,
    dropout: float = 0.0,
    output_shape: int | Sequence[int] | None = None,
    **options: Any,
) -> MultiAxisAttention:
    """Builds a `MultiAxisAttention`, which takes the other keywords.

    Args:
      attention_method: "quadratic" (exact attention) or "linear" (FAVOR+).
      supports: Number of random features of the linear method (required there).
      scaling: Norms of the rows of the projection, 0: of Gaussian vectors, 1: sqrt(key_dim).
      dropout: Dropout rate of attention weights, with both methods.
      output_shape: Last axis or axes of the output, by default `features`.
      **options: `num_heads`, `key_dim`, `value_dim`, `use_bias`, `attention_axes` as in Keras; and
        `rngs` and `features` (one number, or those of query, key and value), which Keras infers.
    """
    if attention_method not in ("linear", "quadratic"):
        raise ValueError(f"attention_method must be 'linear' or 'quadratic': {attention_method!r}.")
    options |= {"dropout_rate": dropout, "output_features": output_shape}
    if attention_method == "quadratic":
        return MultiAxisAttention(**options)
    if supports is None:
        raise ValueError("attention_method='linear' needs supports, its number of random features.")
    favor = make_fast_softmax_attention(
        nb_features=supports, ortho_scaling=scaling, redraw_features=False
    )
    return MultiAxisAttention(attention_fn=favor, **options)
