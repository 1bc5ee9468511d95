"""Multi-axis attention against one call for every place outside the attended axes."""

import jax
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.layers import MultiAxisAttention, Projection, redraw
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled

B, H, D, V, C = 2, 2, 3, 5, 4


def build(**options):
    options = {"features": C, "value_dim": V} | options
    return filled(lambda: MultiAxisAttention(H, D, rngs=nnx.Rngs(0), **options))


def softmax(query, key):
    return np.exp(query @ key.T / np.sqrt(D))


def definition(layer, query, key, value, axes, shown=None, kernel=softmax):
    """`axes` of the inputs are attended over, every head and place of the others by itself."""
    shown = np.ones(key.shape[:-1], bool) if shown is None else shown
    query, key, value = (
        definitions.linear(linear, x).reshape(*x.shape[:-1], H, -1)
        for linear, x in ((layer.query, query), (layer.key, key), (layer.value, value))
    )
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    others = [n if a not in axes else 1 for a, n in enumerate(query.shape[:-2])]
    for place in np.ndindex(*others):
        index = tuple(slice(None) if a in axes else i for a, i in enumerate(place))
        seen = shown[index].ravel()
        for h in range(H):
            q, k, v = (x[(*index, h)] for x in (query, key, value))
            weights = kernel(q.reshape(-1, D), k.reshape(-1, D)[seen])
            mixed = weights / weights.sum(1, keepdims=True) @ v.reshape(-1, v.shape[-1])[seen]
            out[(*index, h)] = mixed.reshape(*q.shape[:-1], -1)
    return definitions.linear(layer.out, out.reshape(*query.shape[:-2], -1))


@pytest.mark.parametrize(
    ("attention_axes", "axes", "key_shape"),
    [
        (None, (1, 2), (B, 4, 3, C)),
        (1, (1,), (B, 5, 2, C)),
        ((-2,), (2,), (B, 3, 4, C)),
        ((2, 1), (1, 2), (B, 1, 1, C)),
    ],
)
def test_equals_the_definition(attention_axes, axes, key_shape):
    layer = build(attention_axes=attention_axes, features=(C, C, 3), use_bias=axes == (1,))
    query, key = draw(B, 3, 2, C), draw(*key_shape, seed=1)
    value = draw(*key_shape[:-1], 3, seed=2)
    out = compiled(layer)(query, key, value)
    np.testing.assert_allclose(
        out, definition(layer, query, key, value, axes), rtol=1e-4, atol=1e-5
    )


def test_hidden_keys_are_as_if_they_were_not_there():
    layer, x = build(attention_axes=(1, 2), output_features=(2, 3)), draw(B, 3, 2, 2, C)
    shown = np.random.default_rng(1).random((B, 3, 2, 2)) < 0.6
    shown[:, 0] = True
    call = compiled(lambda x, mask: layer(x, key_mask=mask))
    out = call(x, shown)
    assert out.shape == (B, 3, 2, 2, 2, 3)
    expected = definition(layer, x, x, x, (1, 2), shown)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_the_linear_method_has_its_own_projection():
    favor = make_fast_softmax_attention(nb_features=8)
    layer = build(attention_fn=favor)
    assert isinstance(layer.projection, Projection)
    rows = definitions.array(layer.projection)

    def kernel(query, key):
        def features(x):
            x = x / D**0.25
            return np.exp(x @ rows.T - np.sum(x * x, axis=1, keepdims=True) / 2)

        return features(query) @ features(key).T

    x = draw(B, 3, 2, C)
    np.testing.assert_allclose(
        compiled(layer)(x), definition(layer, x, x, x, (1, 2), kernel=kernel), rtol=1e-4, atol=1e-5
    )
    parameters = nnx.state(layer, nnx.Param)
    assert len(jax.tree.leaves(parameters)) == 8
    redraw(layer, nnx.Rngs(1))
    assert np.all(definitions.array(layer.projection) != rows)


def test_dropout_follows_its_key():
    layer, x = build(dropout_rate=0.5), draw(B, 3, 2, C)
    drop = lambda seed: layer(x, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.key(seed)))  # noqa: E731
    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.max(np.abs(drop(0) - drop(1))) > 0.01
    with pytest.raises(ValueError, match="dropout_rate=0.5 needs rngs"):
        layer(x, deterministic=False)


def test_shapes_that_do_not_fit_are_errors():
    layer, x = build(attention_axes=1), draw(B, 3, 2, C)
    with pytest.raises(ValueError, match="equal lengths along axis 2"):
        layer(x, draw(B, 3, 5, C))
    with pytest.raises(ValueError, match="same number of axes"):
        layer(x, draw(B, 3, C))
    with pytest.raises(ValueError, match="key and value must agree"):
        layer(x, x, draw(B, 4, 2, C))
    with pytest.raises(ValueError, match="key_mask must have the shape"):
        layer(x, key_mask=np.ones((B, 3), bool))
    with pytest.raises(ValueError, match="axis must name different axes"):
        build(attention_axes=3)(x)
