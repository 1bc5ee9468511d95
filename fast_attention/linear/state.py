"""The recurrent state of linear attention: one mergeable summary of all keys seen.

Shape letters: B batch, T length, H query heads, K key/value heads, D head width, V value width,
M features.

With log-features ``l_jm`` of key j and running maximum ``n_m = max_j l_jm`` the state holds
``kv[v, m] = sum_j v_j exp(l_jm - n_m)`` and ``k_sum[m] = sum_j exp(l_jm - n_m)``, and a query with
log-features ``l_m`` reads ``sum_m exp(l_m + n_m) kv[:, m] / sum_m exp(l_m + n_m) k_sum[m]``.
Because ``k_sum >= 1`` if a key was seen, the largest term of the denominator is at least 1 after
its maximum is subtracted, for any norms.

Reference: Katharopoulos et al., "Transformers are RNNs", arXiv:2006.16236, section 3.4; the running
maximum is that of online softmax (Milakov and Gimelshein, arXiv:1805.02867), kept per feature.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.feature_maps.base import FeatureMap, Features, Parameters
from fast_attention.linear.decay import LOWEST_DECAY

EMPTY_LOG_SCALE = -1e30
"""``log_scale`` if no key was seen. Finite, so that no difference of two scales is nan."""

MASKED_LOG = -3e30
"""Log-feature of a key that must not be seen: below the scale of an empty state, hence exp = 0."""


State = TypeVar("State")


class LinearAttentionState(NamedTuple):
    """The summary of all keys and values seen so far.

    The true sums are ``kv * exp(log_scale)`` and ``k_sum * exp(log_scale)``; results do not depend
    on how they are split, and no gradient flows through ``log_scale``.

    Attributes:
      kv: ``[*B, K, V, M]``, float32 (float64 for float64 inputs).
      k_sum: ``[*B, K, M]``.
      log_scale: ``[*B, K, M]`` for maps that return log-features, ``[*B, K, 1]`` for one scale per
        position, None for maps without exponents.
    """

    kv: Float[Array, "*B K V M"]
    k_sum: Float[Array, "*B K M"]
    log_scale: Float[Array, "*B K N"] | None


def empty_state(
    feature_map: FeatureMap,
    parameters: Parameters,
    batch_shape: tuple[int, ...],
    num_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: Any = None,
) -> LinearAttentionState:
    """Returns the state before any key.

    Args:
      feature_map: the map that will be used.
      parameters: its parameters.
      batch_shape: ``*B``.
      num_heads: K, key/value heads.
      head_dim: D.
      value_dim: V.
      dtype: float32 or float64; None is float64 under ``jax_enable_x64`` and float32 otherwise.
    """
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    num_features = feature_map.num_features(parameters, head_dim)
    shape = (*batch_shape, num_heads)
    widths = {"feature": num_features, "position": 1}
    width = widths.get(feature_map.log_kind)
    return LinearAttentionState(
        kv=jnp.zeros((*shape, value_dim, num_features), dtype),
        k_sum=jnp.zeros((*shape, num_features), dtype),
        log_scale=None if width is None else jnp.full((*shape, width), EMPTY_LOG_SCALE, dtype),
    )


def typed_like(state: State, other: State) -> State:
    """Casts the arrays of a state to the dtypes of those of `other`.

    So a state keeps its dtypes in a call, and can be the carry of a scan.
    """
    return jax.tree.map(lambda x, y: x.astype(y.dtype), state, other)


def emptied(state: LinearAttentionState, gone: Array | None = None) -> LinearAttentionState:
    """Resets the state: everywhere, or in the rows ``[*B]`` where ``gone`` is True."""

    def filled(x: Array, empty: float) -> Array:
        if gone is None:
            return jnp.full_like(x, empty)
        return jnp.where(gone.reshape(*gone.shape, *(1,) * (x.ndim - gone.ndim)), empty, x)

    scale = state.log_scale
    return LinearAttentionState(
        kv=filled(state.kv, 0.0),
        k_sum=filled(state.k_sum, 0.0),
        log_scale=None if scale is None else filled(scale, EMPTY_LOG_SCALE),
    )


def decayed(state: LinearAttentionState, log_decay: Float[Array, "*B K"]) -> LinearAttentionState:
    """Multiplies the sums of a state by ``exp(log_decay)``; a scale alone moves, if it has one."""
    amount = log_decay[..., None].astype(state.kv.dtype)
    if state.log_scale is None:
        factor = jnp.exp(amount)
        return LinearAttentionState(state.kv * factor[..., None], state.k_sum * factor, None)
    # A scale of minus infinity would make nan of what has no keys.
    constant = jax.lax.stop_gradient(jnp.maximum(amount, LOWEST_DECAY))
    # 1, with the derivative of the factor: none flows through scales.
    factor = jnp.exp(amount - constant)
    return LinearAttentionState(
        state.kv * factor[..., None], state.k_sum * factor, state.log_scale + constant
    )


def merge(
    left: LinearAttentionState,
    right: LinearAttentionState,
    log_decay: Float[Array, "*B K"] | None = None,
) -> LinearAttentionState:
    """Returns the state of the keys of both; associative and commutative.

    Both sides are rescaled to the larger scale and added, as in online softmax.

    Args:
      left: one state.
      right: the other state.
      log_decay: ``[*B, K]``, the sum of ``log_decay`` over the tokens of `right`, if `left` comes
        before it: `left` is multiplied by its exponential. None for no decay.
    """
    if log_decay is not None:
        left = decayed(left, log_decay)
    if left.log_scale is None and right.log_scale is None:
        return LinearAttentionState(left.kv + right.kv, left.k_sum + right.k_sum, None)
    left, right = with_scale(left), with_scale(right)
    assert left.log_scale is not None and right.log_scale is not None
    scale = jax.lax.stop_gradient(jnp.maximum(left.log_scale, right.log_scale))
    left_factor = jnp.exp(jax.lax.stop_gradient(left.log_scale) - scale)
    right_factor = jnp.exp(jax.lax.stop_gradient(right.log_scale) - scale)
    return LinearAttentionState(
        kv=left.kv * left_factor[..., None, :] + right.kv * right_factor[..., None, :],
        k_sum=left.k_sum * left_factor + right.k_sum * right_factor,
        log_scale=scale,
    )


def with_scale(state: LinearAttentionState) -> LinearAttentionState:
    """Adds the scale 0 to a state without a scale."""
    if state.log_scale is not None:
        return state
    return state._replace(log_scale=jnp.zeros_like(state.k_sum[..., :1]))


def key_features(
    feature_map: FeatureMap,
    parameters: Parameters,
    key: Float[Array, "*B K T D"],
    *,
    key_mask: Bool[Array, "*B K T"] | None = None,
    key_bias: Float[Array, "*B K T"] | None = None,
    exact_scale: bool = False,
) -> Features:
    """Computes key features with the bias as a factor ``exp(bias)`` and masked keys removed."""
    features = feature_map.apply(key, parameters, is_query=False, exact_scale=exact_scale)
    return mask_features(bias_features(features, key_bias), key_mask)


def bias_features(features: Features, key_bias: Array | None) -> Features:
    """Multiplies features by ``exp(key_bias)``, in the logarithm."""
    if key_bias is None:
        return features
    if features.log is None:
        raise ValueError(
            "A key bias multiplies features by exp(bias), which needs a map with log-features or "
            "scales; wrap the map in WithScale."
        )
    return Features(features.values, features.log + key_bias[..., None])


def mask_features(features: Features, key_mask: Array | None) -> Features:
    """Removes keys where ``key_mask`` is False: their contribution is exactly zero."""
    if key_mask is None:
        return features
    visible = key_mask[..., None]
    if features.log is None:
        assert features.values is not None
        return Features(jnp.where(visible, features.values, 0), None)
    return Features(features.values, jnp.where(visible, features.log, MASKED_LOG))
