"""Layers take empty batches and sequences."""

import jax.numpy as jnp
import pytest
from flax import nnx

from fast_attention import layers, make_local_attention, make_lsh_attention
from tests.layers.definitions import filled

M = 8


def attention(function, **options):
    group = layers.HeadGroup(2, function, rotary="halves")
    return layers.AttentionConfig(groups=(group,), head_dim=4, **options)


LAYERS = {
    "local": (layers.MultiHeadAttention, (M, attention(make_local_attention(2)))),
    "hashed": (
        layers.MultiHeadAttention,
        (M, attention(make_lsh_attention(2, 2, full_attn_thres=0), shared_qk=True)),
    ),
    "linformer": (layers.LinformerAttention, (M, layers.LinformerConfig(2, 3, 2))),
    "axes": (layers.MultiAxisAttention, (2, 4), {"features": M}),
    "memory": (layers.ProductKeyMemory, (M,), {"num_keys": 3, "head_dim": 4, "norm": "batch"}),
    "feed-forward": (layers.FeedForward, (M, 4)),
}


@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name, rows, length):
    kind, arguments, *options = LAYERS[name]
    options = options[0] if options else {}
    layer = filled(lambda: kind(*arguments, **options, rngs=nnx.Rngs(0)))
    x = jnp.ones((rows, length, M))
    training = {"deterministic": False, "rngs": nnx.Rngs(1)}
    assert nnx.jit(lambda layer, x: layer(x, **training))(layer, x).shape == x.shape
    gradient = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x))))(layer, x)
    assert not any(jnp.isnan(g[...]).any() for _, g in nnx.to_flat_state(gradient))
