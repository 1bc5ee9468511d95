"""A dense layer is `x W + b` for any leading axes; flattening them changes no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from fast_attention.layers import Linear
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled


def build(**options):
    return filled(lambda: Linear(5, 3, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 0, 5)])
def test_all_leading_axes_are_batch(shape, use_bias):
    layer = build(use_bias=use_bias)
    out = layer(jnp.asarray(draw(*shape)))
    assert out.shape == (*shape[:-1], 3)
    np.testing.assert_allclose(out, definitions.linear(layer, draw(*shape)), atol=1e-6)


def test_gradients_are_products_of_matrices():
    layer, x, cotangent = build(), draw(2, 4, 5), draw(2, 4, 3)

    @compiled
    @nnx.grad(argnums=(0, 1))
    def gradients(layer, x):
        return jnp.sum(layer(x) * cotangent)

    by_layer, by_x = gradients(layer, x)
    kernel = np.einsum("bti,bto->io", x, cotangent)
    np.testing.assert_allclose(by_layer.kernel[...], kernel, atol=1e-6)
    np.testing.assert_allclose(by_layer.bias[...], cotangent.sum((0, 1)), atol=1e-6)
    np.testing.assert_allclose(by_x, cotangent @ np.asarray(layer.kernel[...]).T, atol=1e-6)


@pytest.mark.devices
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_an_output_sharding_is_honoured_on_the_unflattened_output():
    mesh = jax.make_mesh((2,), ("length",), axis_types=(AxisType.Explicit,))
    spec = PartitionSpec(None, "length", None)
    with jax.set_mesh(mesh):
        layer = build()
        out = layer(jax.device_put(draw(2, 4, 5), spec), out_sharding=spec)
    assert out.sharding.spec == spec
    np.testing.assert_allclose(out, definitions.linear(layer, draw(2, 4, 5)), atol=1e-6)


def test_computes_in_its_dtype_and_keeps_float32_parameters():
    layer = build(dtype=jnp.bfloat16)
    assert layer(jnp.asarray(draw(2, 5))).dtype == jnp.bfloat16
    assert layer.kernel.dtype == layer.bias.dtype == jnp.float32


def test_a_wrong_width_says_both_widths():
    with pytest.raises(TypeError, match=r"\(4,\) and \(5,\)"):
        build()(jnp.ones((2, 4)))
