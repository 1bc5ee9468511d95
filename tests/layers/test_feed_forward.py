"""The feed-forward part is `activation(x W_1 + b_1) W_2 + b_2`, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import ACTIVATIONS, FeedForward
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled

X = draw(2, 3, 4)


def build(**options):
    return filled(lambda: FeedForward(4, 6, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_definition(activation):
    layer = build(activation=activation)
    out = compiled(layer)(X)
    np.testing.assert_allclose(out, definitions.feed_forward(layer, X, activation), atol=1e-6)


def test_dropout_hits_activations_and_outputs_and_leaves_the_expectation():
    layer = build(dropout_rate=0.5)
    drop = compiled(lambda x: layer(x, deterministic=False, rngs=nnx.Rngs(1)))
    samples = drop(np.tile(X[0, 0], (4000, 1)))
    expected = definitions.feed_forward(layer, X[0, 0])
    error = np.std(samples, axis=0) / np.sqrt(4000)
    assert np.all(np.abs(np.mean(samples, axis=0) - expected) < 5 * error)
    # Outputs are dropped at the rate; those that are left differ, as their activations do.
    assert np.mean(samples == 0) == pytest.approx(0.5, abs=0.02)
    assert np.all(np.std(samples, axis=0, where=samples != 0) > 0.05)


def test_dropout_is_off_when_deterministic_and_needs_a_key_otherwise():
    layer, without = build(dropout_rate=0.5), build()
    expected = without(X, deterministic=False)
    np.testing.assert_array_equal(layer(X, rngs=nnx.Rngs(1)), expected)
    with pytest.raises(ValueError, match="no `rngs` argument"):
        layer(X, deterministic=False)


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        (None, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    ],
)
def test_computes_in_its_dtype_or_in_that_of_inputs_and_parameters(dtype, given, expected):
    layer = build(dtype=dtype)
    assert jax.eval_shape(layer, jnp.asarray(X, given)).dtype == expected
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(layer)))


def test_an_unknown_activation_is_told_what_there_is():
    with pytest.raises(ValueError, match=r"one of \['gelu', .*'squared_relu'\], got 'swish'"):
        build(activation="swish")
