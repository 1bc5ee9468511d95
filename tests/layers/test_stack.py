"""A block is `x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import Block
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled

B, T, M = 2, 5, 6
X = draw(B, T, M)


def build(**options: Any):
    options = {"qkv_features": 8, "num_kv_heads": 1} | options
    return filled(lambda: Block(M, 2, 10, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_definition(causal):
    options = {"causal": causal, "shift_tokens": causal, "rotary": causal, "activation": "silu"}
    layer = build(**options)
    expected = [definitions.block(layer, row, 2, **options) for row in X]
    np.testing.assert_allclose(compiled(layer)(X), expected, atol=3e-6)


def test_dropout_hits_what_attention_adds_and_not_the_residual_stream():
    layer = build(dropout_rate=0.5)
    for part in (layer.feed_forward.down.kernel, layer.feed_forward.down.bias):
        part[...] = jnp.zeros_like(part[...])  # Nothing is added after attention.

    @compiled
    def dropped(seed):
        return layer(X, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.key(seed)))

    added, whole = dropped(0) - X, compiled(layer)(X) - X
    kept = np.abs(added) > 1e-6
    assert 0.25 < kept.mean() < 0.75
    np.testing.assert_allclose(added, np.where(kept, 2 * whole, 0), atol=1e-6)
    np.testing.assert_array_equal(dropped(0) - X, added)
    assert np.any((np.abs(dropped(1) - X) > 1e-6) != kept)


def test_attention_and_feed_forward_have_rates_of_their_own():
    layer = build(dropout_rate=0.25, attention_dropout_rate=0.5)
    assert layer.attention.dropout_rate == 0.5
    assert layer.dropout.rate == layer.feed_forward.dropout.rate == 0.25
    with pytest.raises(ValueError, match="dropout_rate=0.5 needs rngs"):
        jax.eval_shape(lambda: layer(X, deterministic=False))


def test_computes_in_its_dtype_and_its_state_keeps_its_types():
    layer = build(causal=True, shift_tokens=True, dtype=jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16)
    assert jax.eval_shape(layer, x).dtype == jnp.bfloat16
    state = jax.eval_shape(lambda: layer.init_state(B, T))
    for read, new in ((layer.prefill, x), (layer.step, x[:, 0])):
        out, after = jax.eval_shape(read, state, new)
        assert out.dtype == jnp.bfloat16
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(layer)))


def test_only_causal_layers_shift():
    with pytest.raises(ValueError, match="got causal=False"):
        build(shift_tokens=True)
