"""Attention transfer: errors by their definition, and training that changes features alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.layers import (
    AttentionConfig,
    HeadGroup,
    MultiHeadAttention,
    linearize,
    output_errors,
    transfer_loss,
    with_attention,
)
from fast_attention.layers.attention.stored_projections import TrainedTuning

B, T, H, K, D, FEATURES = 3, 9, 4, 2, 4, 16
HEDGEHOG = make_fast_softmax_attention(nb_features=8, estimator="hedgehog")
VISIBLE = jnp.arange(T)[None] < jnp.array([[T], [5], [T]])


def make_layer():
    layer = MultiHeadAttention(
        FEATURES, AttentionConfig((HeadGroup(H),), D, num_kv_heads=K), rngs=nnx.Rngs(0)
    )
    kernel = layer.project.query.kernel
    kernel[...] = 5 * kernel[...]
    return layer


def sample(seed):
    return jax.random.normal(jax.random.key(seed), (B, T, FEATURES))


def test_errors_are_those_of_the_heads_outputs():
    """Through the layer's own dense layer, which is made the identity; padding does not count."""
    exact = make_layer()
    exact.out.kernel[...] = jnp.eye(H * D)
    linear = with_attention(exact, HEDGEHOG, nnx.Rngs(1))
    (found,) = output_errors(exact, linear, sample(1), key_mask=VISIBLE).values()
    outputs = [
        np.asarray(model(sample(1), key_mask=VISIBLE), np.float64).reshape(B, T, H, D)
        for model in (exact, linear)
    ]
    counted = np.asarray(VISIBLE)[..., None, None]
    size = (counted * outputs[0] ** 2).sum(axis=(0, 1, 3))
    error = (counted * (outputs[1] - outputs[0]) ** 2).sum(axis=(0, 1, 3))
    np.testing.assert_allclose(found.size, size, rtol=1e-4)
    np.testing.assert_allclose(found.error, error, rtol=1e-3)
    loss = transfer_loss({"layer": found})
    np.testing.assert_allclose(loss, np.mean(error / size), rtol=1e-3)


def test_training_lowers_the_error_and_changes_features_alone():
    exact = make_layer()
    before = jax.tree.map(np.asarray, nnx.state(exact))
    batches = [{"x": sample(1), "key_mask": VISIBLE}] * 60
    linear = linearize(exact, HEDGEHOG, batches, optax.adam(3e-2), nnx.Rngs(1))
    start = with_attention(exact, HEDGEHOG, nnx.Rngs(1))
    first, last = (
        float(transfer_loss(output_errors(exact, model, sample(1), key_mask=VISIBLE)))
        for model in (start, linear)
    )
    assert last < 0.8 * first
    for model in (exact, linear):
        _, rest = nnx.state(model, TrainedTuning, ...)
        for name in ("project", "out"):
            same = jax.tree.map(
                np.array_equal, nnx.to_pure_dict(rest)[name], nnx.to_pure_dict(before)[name]
            )
            assert all(jax.tree.leaves(same))


def test_what_cannot_be_trained_says_so():
    exact = make_layer()
    with pytest.raises(ValueError, match="no learned features: use estimator='hedgehog'"):
        plain = make_fast_softmax_attention(nb_features=8)
        linearize(exact, plain, [], optax.adam(1e-2), nnx.Rngs(0))
    with pytest.raises(ValueError, match="the same attention functions"):
        output_errors(exact, nnx.clone(exact), sample(0))
