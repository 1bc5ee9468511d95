"""The TensorFlow layer's keywords; its numbers are golden cases."""

import numpy as np
import pytest
from flax import nnx

from fast_attention.models.originals.tensorflow_performer import MultiHeadAttention
from tests.layers.definitions import draw, filled


def build(**options):
    options = {"num_heads": 2, "key_dim": 3, "features": 4} | options
    return filled(lambda: MultiHeadAttention(rngs=nnx.Rngs(0), **options))


def test_methods_and_shapes():
    x = draw(2, 3, 2, 4)
    exact = build(value_dim=5, output_shape=7, attention_axes=(1,), dropout=0.1)
    assert exact.projection is None and exact.dropout_rate == 0.1
    assert exact(x).shape == (2, 3, 2, 7)
    linear = build(attention_method="linear", supports=6, scaling=1, use_bias=False)
    assert linear.projection.shape == (6, 3) and linear.query.bias is None
    np.testing.assert_array_equal(linear(x), linear(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="kernel_initializer"):
        build(kernel_initializer="ones")
    with pytest.raises(ValueError, match="must be 'linear' or 'quadratic'"):
        build(attention_method="cubic")
    with pytest.raises(ValueError, match="needs supports"):
        build(attention_method="linear")
    with pytest.raises(ValueError, match="ortho_scaling must be 0"):
        build(attention_method="linear", supports=6, scaling=2)
