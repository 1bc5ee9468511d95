"""Decay in the heads of a layer: none, or fixed, learned or token-dependent factors.

Shape letters: B batch, T length, K key/value heads, M features of the stream.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Float
from fast_attention.layers.attention.config import AttentionConfig, Decay
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes


def decay_slopes(num_heads: int) -> np.ndarray:
    """Returns ``2^(-8 (k + 1) / K)`` for head k, ``[K]`` float32, as in ALiBi.

    Reference: Press et al., "Train Short, Test Long", arXiv:2108.12409; as decays of linear
    attention in Qin et al., "Lightning Attention-2", arXiv:2401.04658.
    """
    return np.exp2(-8.0 * np.arange(1, num_heads + 1) / num_heads).astype(np.float32)


class HeadDecay(nnx.Module):
    """Computes ``log_decay`` of linear attention, see :func:`fast_attention.linear_attention`.

    - "fixed": ``-slope_k``, not trained.
    - "learned": ``-softplus(bias_k)``, at first the same.
    - "token": ``-softplus(x_t . kernel_k + bias_k)``, with a kernel of zeros at first, as the gates
      of Mamba-2 (arXiv:2405.21060) and of simple gated linear attention are.

    Attributes:
      kind: one of these.
      num_kv_heads: K.
      kernel: ``[M, K]``, or None.
      bias: ``[K]``, or None for fixed ones.
    """

    def __init__(self, kind: Decay, features: int, num_kv_heads: int):
        """Initializes the decays as :func:`decay_slopes`.

        Args:
          kind: "fixed", "learned" or "token".
          features: M.
          num_kv_heads: K.
        """
        self.kind: Decay = kind
        self.num_kv_heads = num_kv_heads
        self.kernel = nnx.data(None)
        self.bias = nnx.data(None)
        if kind != "fixed":
            # The inverse of softplus.
            self.bias = nnx.Param(jnp.asarray(np.log(np.expm1(decay_slopes(num_kv_heads)))))
        if kind == "token":
            self.kernel = nnx.Param(jnp.zeros((features, num_kv_heads)))

    @modules_run_on_auto_axes
    def __call__(self, x: Float[Array, "*B M"]) -> Float[Array, "*B K"] | Float[Array, "*#B K"]:
        """Returns the logarithms, in at least float32; ``[K]`` if equal for all tokens."""
        if self.bias is None:
            return jnp.asarray(-decay_slopes(self.num_kv_heads))
        raw = self.bias[...]
        if self.kernel is not None:
            compute = at_least_float32(x.dtype)
            gate = x.astype(compute) @ self.kernel[...].astype(compute)
            raw = gate + raw.astype(compute).reshape((1,) * (gate.ndim - 1) + raw.shape)
        return -jax.nn.softplus(raw)


def head_decay(features: int, config: AttentionConfig) -> HeadDecay | None:
    """Returns the decay of a layer of this shape, or None."""
    if config.decay is None:
        return None
    return HeadDecay(config.decay, features, config.kv_heads)


def decays_of_groups(
    decay: HeadDecay | None, config: AttentionConfig, x: Array
) -> list[dict[str, Any]]:
    """Returns the keyword argument for each group's attention function, if it supports decay.

    Args:
      decay: the decay of the layer, or None.
      config: shape of the layer.
      x: the stream, ``[*B, M]``.
    """
    if decay is None:
        return [{} for _ in config.groups]
    parts = zip(config.groups, config.split_keys(decay(x), axis=-1), strict=True)
    return [{"log_decay": own} if group.attention_fn.takes.decay else {} for group, own in parts]
