"""Averages of the values that each query sees.

Shape letters: B batch, T queries, S keys, K key/value heads, V value width.
"""

import jax.numpy as jnp


def uniform_attention(value, seen, key_bias=None, precision=None):
    """``sum_s w_ts v_s / sum_s w_ts``, where ``w_ts = exp(bias_s)`` of keys that t sees, else 0.

    Args:
      value: ``[*B, S, K, V]``.
      seen: bool, broadcastable to ``[*B, K, T, S]``.
      key_bias: ``[*B, S, K or 1]`` or None.
      precision: of the product.

    Returns:
      ``[*B, T, K, V]``; zeros for a query that sees no key.
    """
    logs = jnp.zeros((1,) * seen.ndim)
    if key_bias is not None:
        logs = jnp.swapaxes(key_bias, -1, -2)[..., None, :]
    most = jnp.max(jnp.where(seen, logs, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.where(seen, jnp.exp(logs - jnp.where(jnp.isfinite(most), most, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    heads = jnp.broadcast_to(
        weights, (*value.shape[:-3], value.shape[-2], *weights.shape[-2:])
    ).astype(value.dtype)
    return jnp.einsum("...kts,...skv->...tkv", heads, value, precision=precision)
