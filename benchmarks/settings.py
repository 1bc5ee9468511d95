"""The shape that is measured, and the arrays of that shape that every case is given."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax import Array


@dataclasses.dataclass(frozen=True)
class Setting:
    """One shape: B batch, T length, H heads, D width of queries, keys and values, M features."""

    length: int = 4096
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    features: int = 256
    dtype: str = "float32"

    @property
    def tensor_bytes(self) -> int:
        """Size of one array ``[B, T, H, D]``, the unit in which memory is judged."""
        width = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return self.batch * self.length * self.heads * self.head_dim * width


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Random arrays of one setting.

    Attributes:
      setting: the shape.
      qkv: query, key and value ``[B, T, H, D]``, unit normal.
      cotangent: what the outputs' gradient is taken against, ``[B, T, H, D]``.
      projection: orthogonal ``[M, D]``, the same for all cases that project.
    """

    setting: Setting
    qkv: tuple[Array, Array, Array]
    cotangent: Array
    projection: Array


def make_inputs(setting: Setting) -> Inputs:
    """Draws the arrays of a setting, the same in every run."""
    import jax

    from fast_attention.feature_maps import PositiveFeatures

    shape = (setting.batch, setting.length, setting.heads, setting.head_dim)
    query, key, value, cotangent = (
        jax.random.normal(jax.random.key(seed), shape, setting.dtype) for seed in range(4)
    )
    projection = PositiveFeatures(setting.features).init(jax.random.key(4), setting.head_dim)
    return Inputs(setting, (query, key, value), cotangent, projection)
