"""Batch norm that ignores padding.

Shape letters: B batch and length, M features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes


class MaskedBatchNorm(nnx.Module):
    """``scale (x - mean) / sqrt(var + epsilon) + bias``, mean and variance over visible positions.

    The running variance is the unbiased one (divided by n - 1), as in PyTorch.

    Attributes:
      scale, bias: Parameters ``[M]``.
      mean, var: Running averages ``[M]``, `nnx.BatchStat`.
    """

    def __init__(self, features: int, *, momentum: float = 0.9, epsilon: float = 1e-5):
        """Initializes the norm as the identity, up to epsilon.

        Args:
          features: M.
          momentum: Decay of the running averages at each training call.
          epsilon: Added to the variance.
        """
        self.momentum = momentum
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))

    @modules_run_on_auto_axes
    def __call__(
        self,
        x: Float[Array, "*B M"],
        *,
        key_mask: Bool[Array, "*B"] | None = None,
        use_running_average: bool,
    ) -> Float[Array, "*B M"]:
        """Normalises every position, also masked ones.

        Args:
          x: ``[*B, M]``.
          key_mask: ``[*B]``, False at positions to exclude from mean and variance.
          use_running_average: Use running averages, as in evaluation; otherwise use mean and
            variance of `x`, which also update the running averages (unless nothing is visible).

        Returns:
          ``[*B, M]`` in the dtype of `x`; computed in at least float32.
        """
        working = x.astype(at_least_float32(x.dtype))
        if use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._of_batch(working, key_mask)
        features = x.shape[-1:]
        mean, var, scale, bias = (
            a.reshape((1,) * (x.ndim - 1) + features)
            for a in (mean, var, self.scale[...], self.bias[...])
        )
        return ((working - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias).astype(x.dtype)

    def _of_batch(self, x: Array, key_mask: Array | None) -> tuple[Array, Array]:
        rows = x.reshape(-1, x.shape[-1])
        visible = jnp.ones(len(rows), bool) if key_mask is None else key_mask.reshape(-1)
        count = jnp.sum(visible, dtype=x.dtype)

        def average(rows):
            return jnp.sum(jnp.where(visible[:, None], rows, 0), axis=0) / jnp.maximum(count, 1)

        mean = average(rows)
        var = average(jnp.square(rows - mean[None]))
        kept = jnp.where(count > 0, self.momentum, 1.0)
        unbiased = var * count / jnp.maximum(count - 1, 1)
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            old = running[...]
            new = kept * old + (1 - kept) * jax.lax.stop_gradient(new)
            running[...] = new.astype(old.dtype)
        return mean, var
