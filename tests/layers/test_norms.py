"""Norms against their formulas, and their gradients where a vector is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import NORMS, ReZero, make_norm
from tests.layers.definitions import array, compiled, draw, filled

X = draw(2, 3, 5)


def normed(kind, layer, x, epsilon):
    """The formulas, for one vector at a time."""
    centred = x - x.mean(-1, keepdims=True)
    if kind == "layer":
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return scaled * array(layer.scale) + array(layer.bias)
    if kind == "scale":
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        return x / np.maximum(length, epsilon) * array(layer.scale)
    if kind == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * array(layer.scale)
    return x


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("kind", NORMS)
def test_equals_the_definition(kind, epsilon):
    def make():
        return make_norm(kind, 5, epsilon=epsilon, rngs=nnx.Rngs(0))

    layer = make() if kind == "none" else filled(make)
    x = np.concatenate([X, 0.01 * X])
    np.testing.assert_allclose(
        compiled(layer)(x), normed(kind, layer, np.float64(x), epsilon), atol=2e-6
    )


@pytest.mark.parametrize("kind", NORMS)
def test_zero_and_large_vectors_have_finite_gradients_in_half_precision(kind):
    layer = make_norm(kind, 5, dtype=jnp.float16, rngs=nnx.Rngs(0))
    x = jnp.asarray(100 * X, jnp.float16).at[0, 0].set(0)
    value, gradient = compiled(jax.value_and_grad(lambda x: jnp.sum(layer(x)[..., 0] / 256)))(x)
    assert layer(x).dtype == jnp.float16 and np.isfinite(value)
    assert np.isfinite(np.asarray(gradient[0, 1:])).all() and np.isfinite(gradient[1]).all()
    # The slope at zero is 1 / epsilon, more than float16 holds: in float32 it is that number.
    if kind == "scale":
        slope = jax.grad(lambda x: make_norm(kind, 5, rngs=nnx.Rngs(0))(x)[0])(jnp.zeros(5))
        np.testing.assert_allclose(slope, [1e5, 0, 0, 0, 0], rtol=1e-5)


def test_float64_is_honoured():
    with jax.enable_x64(True):
        x = np.float64(X)
        layer = make_norm("scale", 5, rngs=nnx.Rngs(0))
        out = layer(jnp.asarray(x))
        np.testing.assert_allclose(out, normed("scale", layer, x, 1e-5), rtol=1e-14)


def test_an_unknown_norm_is_told_what_there_is():
    with pytest.raises(ValueError, match=r"one of \['layer', .*, 'none'\], got 'batch'"):
        make_norm("batch", 5, rngs=nnx.Rngs(0))


def test_rezero_is_a_gain_that_learns():
    layer = ReZero(1e-3)
    x = jnp.asarray(X, jnp.bfloat16)
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(layer(jnp.asarray(X)), 1e-3 * X, rtol=1e-6)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(jnp.asarray(X))))(ReZero())
    np.testing.assert_allclose(gradient.gain[...], X.sum(), rtol=1e-5)
