"""What is recomputed has the values and gradients of what is kept, and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.layers.stack.recomputing import recomputed
from tests.leaks import checking_leaks

N, M, WIDE = 64, 8, 128


def layer(parameters, x, shared, saved):
    """A wide layer that chooses in the forward pass, with an integer and a key for company."""
    weight, key, number = parameters
    choice = x[0, 0] > 0 if saved is None else saved
    scale = jnp.where(choice, 1.0, 2.0) * jax.random.uniform(key) * number
    inner = jnp.tanh(x @ weight * scale) * shared["gain"]
    return jnp.sin(inner) @ weight.T, choice


def arguments():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, M, WIDE)).astype(np.float32) * 0.3
    parameters = [(w, jax.random.key(i), 2) for i, w in enumerate(weights)]
    shared = {"gain": np.float32(0.7), "ids": np.arange(N)}
    return parameters, rng.normal(size=(N, M)).astype(np.float32), shared


def loss(apply):
    def total(weights, x, gain):
        parameters, _, shared = arguments()
        for weight, (_, key, number) in zip(weights, parameters, strict=True):
            increment, choice = apply(layer, (weight, key, number), x, shared | {"gain": gain})
            assert choice.dtype == bool
            x = x + increment
        return jnp.sum(x**2)

    return jax.value_and_grad(total, argnums=(0, 1, 2))


def kept(function, parameters, x, shared):
    return function(parameters, x, shared, None)


def inputs():
    parameters, x, shared = arguments()
    return [weight for weight, _, _ in parameters], x, shared["gain"]


def test_values_and_gradients_are_those_of_what_is_kept():
    with checking_leaks():
        found = jax.jit(loss(recomputed))(*inputs())
    expected = jax.jit(loss(kept))(*inputs())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)


@pytest.mark.usefixtures("optimized")
def test_what_is_recomputed_is_not_kept():
    """Barriers alone are gone on CPU before equal computations are looked for."""

    def temporaries(apply):
        program = jax.jit(loss(apply)).lower(*inputs()).compile()
        return program.memory_analysis().temp_size_in_bytes

    layers, one = 3, 4 * N * WIDE
    assert temporaries(kept) > layers * one
    assert temporaries(recomputed) < temporaries(kept) / 1.8
