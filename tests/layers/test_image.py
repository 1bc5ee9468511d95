"""Image attention against loops over pixels, with every kernel, stride and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import ImageLinearAttention
from tests.layers.definitions import array, compiled, draw, filled

B, C, H, D, V = 2, 3, 2, 4, 5


def build(**options):
    options = {"key_dim": D, "value_dim": V, "num_heads": H} | options
    return filled(lambda: ImageLinearAttention(C, rngs=nnx.Rngs(0), **options))


def convolution(module, x, stride, padding):
    kernel, bias = array(module.kernel), array(module.bias)
    side = len(kernel)
    (top, bottom), sides = padding
    x = np.pad(x, ((0, 0), (top, bottom), (sides, sides), (0, 0)))
    rows, columns = ((n - side) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, len(bias)))
    for i, j in np.ndindex(rows, columns):
        patch = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
        out[:, i, j] = np.einsum("bxyc,xyco->bo", patch, kernel) + bias
    return out


def soft(x, axis):
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def definition(layer, x, context=None, *, stride=1, padding=0, kernel_size=1, norm_queries=True):
    same = ((padding, padding), padding)
    query, key, value = (
        convolution(module, x, stride, same) for module in (layer.query, layer.key, layer.value)
    )
    query, key = query * D**-0.25, key * D**-0.25
    shape = query.shape[:3]
    query, key, value = (m.reshape(len(x), -1, H, m.shape[-1] // H) for m in (query, key, value))
    if context is not None:
        row = context.reshape(len(x), 1, -1, C)
        missing = max(0, kernel_size - 1 - 2 * padding)
        above = (padding + missing // 2, padding + missing - missing // 2)
        more_key = convolution(layer.key, row, stride, (above, padding)).reshape(len(x), -1, H, D)
        more = convolution(layer.value, row, stride, (above, padding)).reshape(len(x), -1, H, V)
        key, value = np.concatenate([key, more_key], 1), np.concatenate([value, more], 1)
    query = soft(query, -1) if norm_queries else query
    summary = np.einsum("bphd,bphv->bhdv", soft(key, 1), value)
    out = np.einsum("bphd,bhdv->bphv", query, summary).reshape(*shape, -1)
    return convolution(layer.out, out, 1, same)


@pytest.mark.parametrize(
    ("options", "context_shape"),
    [
        ({}, None),
        ({"norm_queries": False}, (4, 2)),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, (7,)),
        ({"kernel_size": 2}, (2, 2, 2)),
    ],
)
def test_equals_the_definition(options, context_shape):
    layer = build(out_channels=6, **options)
    x = draw(B, 6, 5, C)
    context = None if context_shape is None else draw(B, *context_shape, C, seed=1)
    out = compiled(lambda x, context: layer(x, context=context))(x, context)
    np.testing.assert_allclose(out, definition(layer, x, context, **options), rtol=1e-4, atol=2e-5)


def test_channels_may_come_first():
    last, first = build(), build(channel_first=True)
    x, context = draw(B, 4, 3, C), draw(B, 5, 2, C, seed=1)
    expected = last(x, context=context)
    out = first(jnp.moveaxis(x, -1, 1), context=jnp.moveaxis(context, -1, 1))
    np.testing.assert_array_equal(out, jnp.moveaxis(expected, -1, 1))


def test_gradients_reach_all_parameters_and_large_inputs_stay_finite():
    layer, x = build(), draw(B, 4, 3, C) * 100

    @compiled
    @nnx.grad
    def gradient(layer):
        return jnp.sum(layer(x) ** 2)

    leaves = jax.tree.leaves(nnx.state(gradient(layer)))
    assert len(leaves) == 8
    # The gradient of the keys' bias is zero: it is the same at all pixels.
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(bool(np.any(np.abs(leaf) > 1e-2)) for leaf in leaves) >= 5


def test_what_does_not_fit_is_an_error():
    layer = build(kernel_size=3)
    with pytest.raises(ValueError, match="does not fit into x with sides"):
        layer(draw(B, 2, 5, C))
    with pytest.raises(ValueError, match="does not fit into attention of x"):
        layer(draw(B, 4, 4, C))
    with pytest.raises(ValueError, match="row of context pixels"):
        layer(draw(B, 6, 6, C), context=draw(B, 2, C))
    with pytest.raises(ValueError, match="four axes"):
        layer(draw(B, 6, C))
