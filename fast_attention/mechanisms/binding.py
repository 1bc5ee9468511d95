"""What all attention functions do with the arguments of a call before they attend.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.mechanisms.axes import attended_axes, fold_axes
from fast_attention.mechanisms.call import Call, Dropout, Takes
from fast_attention.mechanisms.checks import (
    check_flag,
    check_operands,
    check_rate,
    float_arrays,
    mismatch,
)

_ADVICE = {
    "module": "attention weights are not computed; use sow_weights=False",
    "qk_attn_weights_einsum": "leave qk_attn_weights_einsum_cls unset",
    "attn_weights_value_einsum": "leave attn_weights_value_einsum_cls unset",
    "input_positions": "apply rotary positions to queries and keys before the call, for example "
    "with "
    "fast_attention.layers.MultiHeadAttention(rotary=True)",
    "bias": "use mask or key_mask, or exact attention (make_softmax_attention) with a bias",
    "projection": "it has no random features",
    "positions": "apply rotary positions to queries and keys before",
    "buckets": "it does not hash",
    "log_decay": "only linear attention supports it "
    "(make_fast_softmax_attention, make_fast_generalized_attention)",
}
"""What to do in place of an argument that a function does not take."""


def bind(
    mechanism: str,
    takes: Takes,
    query: Any,
    key: Any,
    value: Any,
    *,
    dtype: Any,
    axis: int | tuple[int, ...] | None,
    causal: bool,
    **others: Any,
) -> Call:
    """Checks queries, keys and values, casts them to one type and folds the attended axes.

    Args:
      mechanism: name of the function, for messages.
      takes: what it honours.
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      dtype: of the computation, None promotes.
      axis: attended axis or axes.
      causal: whether causality was asked for; one query over several keys is left to the mask.
      **others: more fields of the call.

    Raises:
      ValueError: for operands that do not fit together.
    """
    query, key, value = float_arrays(query, key, value, dtype)
    check_operands(mechanism, query, key, value, takes.shared_qk)
    axes = attended_axes(query.ndim, axis)
    shapes = {"shape": query.shape, "key_shape": key.shape}
    query, key, value = (fold_axes(x, axes, trailing=2) for x in (query, key, value))
    cached = query.shape[-3] == 1 < key.shape[-3]
    causality = {"causal": causal and not cached, "steps": causal and cached}
    return Call(query, key, value, **causality, axes=axes, **shapes, **others)


def dropout_of(key: Any, rate: Any, broadcast: Any, deterministic: bool) -> Dropout | None:
    """Checks the arguments of dropout, also where there is none."""
    rate = check_rate("dropout_rate", rate)
    broadcast = check_flag("broadcast_dropout", broadcast)
    if not rate or deterministic:
        return None
    if key is None:
        raise ValueError(
            f"dropout_rate={rate} needs a dropout_rng, a JAX random key: pass one, or "
            "deterministic=True."
        )
    return Dropout(key, rate, broadcast)


def refuse(mechanism: str, **arguments: Any) -> None:
    """Raises ValueError at the first argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            given = type(value).__name__
            if isinstance(value, np.ndarray | jax.Array):
                given = f"an array of shape {jnp.shape(value)}"
            raise mismatch(name, f"None for {mechanism.lower()}", given, _ADVICE[name])


def refuse_untaken(mechanism: str, takes: Takes, call: Call, bias: Any = None) -> None:
    """Raises ValueError for what a function does not honour."""
    if takes.bias is None:
        refuse(mechanism, bias=bias)
    if not takes.decay:
        refuse(mechanism, log_decay=call.log_decay)
    if not takes.projection:
        refuse(mechanism, projection=call.projection)
    if not takes.positions:
        refuse(mechanism, positions=call.positions)
    if not takes.buckets:
        refuse(mechanism, buckets=call.buckets)
        for name, asked in (
            ("return_weights", call.return_weights),
            ("return_buckets", call.return_buckets),
        ):
            if asked:
                raise mismatch(name, f"False for {mechanism.lower()}", asked, "only LSH has them")
