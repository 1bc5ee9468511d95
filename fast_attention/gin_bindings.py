"""The one place where attention functions and kernels get their gin names.

Import it (the protein language models do) to write, as with the original code::

    FlaxModel.attention_fn = @make_fast_softmax_attention()
    make_fast_generalized_attention.kernel_fn = @jshiftedelu
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fast_attention.feature_maps import elementwise
from fast_attention.mechanisms.efficient.fn import make_efficient_attention
from fast_attention.mechanisms.favor.factories import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
)
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.mechanisms.lsh.fn import make_lsh_attention
from fast_attention.mechanisms.strided.fn import make_strided_attention
from fast_attention.softmax_attention import make_softmax_attention

KERNEL_NAMES = {
    "jcos": jnp.cos,
    "jsin": jnp.sin,
    "jtanh": jnp.tanh,
    "jsigmoid": jax.nn.sigmoid,
    "jgelu": elementwise.exact_gelu,
    "jrelu": elementwise.relu,
    "jrequ": elementwise.squared_relu,
    "jexp": jnp.exp,
    "jidentity": elementwise.identity,
    "jshiftedelu": elementwise.shifted_elu,
}
"""Kernels by the gin names of the original code (``jrelu`` was in its first version)."""

make_fast_softmax_attention = gin.external_configurable(
    make_fast_softmax_attention, "make_fast_softmax_attention"
)
make_fast_generalized_attention = gin.external_configurable(
    make_fast_generalized_attention, "make_fast_generalized_attention"
)
make_efficient_attention = gin.external_configurable(
    make_efficient_attention, "make_efficient_attention"
)
make_strided_attention = gin.external_configurable(make_strided_attention, "make_strided_attention")
make_lsh_attention = gin.external_configurable(make_lsh_attention, "make_lsh_attention")
make_local_attention = gin.external_configurable(make_local_attention, "make_local_attention")
make_softmax_attention = gin.external_configurable(make_softmax_attention, "make_softmax_attention")
for _name, _kernel in KERNEL_NAMES.items():
    gin.external_configurable(_kernel, _name)
