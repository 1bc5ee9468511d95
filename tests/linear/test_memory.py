"""No array of length T holds features or states: read off the compiled programs, unrun."""

import jax
import jax.numpy as jnp
import pytest

from fast_attention.feature_maps import PositiveFeatures
from tests.linear import cases

# Rounding and memory are those of programs as users have them.
pytestmark = pytest.mark.usefixtures("optimized")

T, H, D, M = 4096, 2, 64, 128
FLOAT = 4


def temporary_bytes(function, *arguments):
    memory = cases.compiled(function).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("implementation", "causal"),
    [("chunked", True), ("chunked", False), ("parallel_chunks", True)],
)
def test_memory_is_linear(implementation, causal):
    x = jax.ShapeDtypeStruct((1, T, H, D), jnp.float32)
    projection = jax.ShapeDtypeStruct((M, D), jnp.float32)

    def attend(q, k, v, projection):
        return cases.attend(
            q,
            k,
            v,
            feature_map=PositiveFeatures(M),
            parameters=projection,
            causal=causal,
            implementation=implementation,
        )

    def loss(*arguments):
        return jnp.sum(attend(*arguments) ** 2)

    if not causal:  # The causal one has a test of its own, of a million tokens.
        assert temporary_bytes(attend, x, x, x, projection) < T * H * M * FLOAT
    backward = temporary_bytes(jax.grad(loss, argnums=(0, 1, 2, 3)), x, x, x, projection)
    states = T * H * M * D * FLOAT
    # The state at every chunk's start and a few arrays as long as the inputs.
    assert backward < states / 16
