"""Dense layers that treat all leading axes as one."""

from __future__ import annotations

from typing import Any

from flax import nnx

from fast_attention.arrays.types import Array, Float


def xavier_linear(
    inputs: int, outputs: int, *, use_bias: bool = True, dtype: Any = None, rngs: nnx.Rngs
) -> Linear:
    """Makes a layer with a Xavier-uniform kernel, as the dense layers of this package have."""
    init = nnx.initializers.xavier_uniform()
    return Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs)


class Linear(nnx.Linear):
    """``nnx.Linear`` on inputs flattened to a matrix.

    The values are the same. The gradient of the kernel is then a product of two matrices. With
    separate batch and length axes, XLA on CPU would transpose its operands (with activation
    functions fused into them), at several times the cost.

    Attributes:
      flat: Whether inputs are flattened; False if both batch and length are sharded.
    """

    flat: bool = True

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: Any = None) -> Array:
        """Returns ``inputs @ kernel + bias``, ``[*B, O]``; not flattened with `out_sharding`."""
        if out_sharding is not None or not self.flat:
            return super().__call__(inputs, out_sharding=out_sharding)
        out = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return out.reshape(*inputs.shape[:-1], out.shape[-1])
