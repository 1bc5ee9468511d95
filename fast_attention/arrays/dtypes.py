"""The types of arrays: those in which sums and exponentials are computed, and random keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array


def at_least_float32(dtype: Any) -> Any:
    """Returns float32, or `dtype` itself if it is a wider floating type.

    Unlike ``jnp.promote_types`` this does not depend on ``jax.numpy_dtype_promotion``.
    """
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 32
    return jnp.dtype(dtype) if wide else jnp.dtype(jnp.float32)


def widest(*dtypes: Any) -> Any:
    """Returns the widest of some floating types; of equally wide ones the first."""
    return max((jnp.dtype(dtype) for dtype in dtypes), key=lambda dtype: dtype.itemsize)


def is_random_key(x: Array) -> bool:
    """Returns whether an array holds typed random keys, not their numbers."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
