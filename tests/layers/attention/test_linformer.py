"""The Linformer layer against its function, with every way of sharing."""

import jax
import numpy as np
import pytest
from flax import nnx

from fast_attention import linformer_attention
from fast_attention.layers import LinformerAttention, LinformerConfig
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled

B, T, L, M, N = 2, 5, 7, 6, 4


def build(**options):
    config = LinformerConfig(2, L, 3, **options)
    return filled(lambda: LinformerAttention(M, config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross": True, "context_features": N, "head_dim": 5, "use_bias": True},
        {"one_kv_head": True, "share_kv": True, "use_out_bias": False},
    ],
)
def test_is_its_function_between_dense_layers(options):
    layer = build(**options)
    context = draw(B, L, N, seed=1) if "context_features" in options else None
    x = draw(B, L if context is None else T, M)
    source = x if context is None else context
    width = options.get("head_dim", 3)

    def heads(linear, x):
        return definitions.linear(linear, x).reshape(*x.shape[:2], -1, width)

    key = heads(layer.key, source)
    shared = options.get("share_kv", False)
    assert (layer.value is None) == (layer.value_projection is None) == shared
    assert key.shape[2] == (1 if "one_kv_head" in options else 2)
    value = key if shared else heads(layer.value, source)
    mix = definitions.array(layer.key_projection)
    value_mix = mix if shared else definitions.array(layer.value_projection)
    expected = linformer_attention(heads(layer.query, x), key, value, mix, value_mix)
    out = compiled(lambda x, context: layer(x, context=context))(x, context)
    expected = definitions.linear(layer.out, np.asarray(expected).reshape(*x.shape[:2], -1))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_dropout_follows_its_key():
    layer, x = build(dropout_rate=0.5), draw(B, L, M)
    drop = lambda seed: layer(x, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.key(seed)))  # noqa: E731
    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.max(np.abs(drop(0) - drop(1))) > 0.01
    with pytest.raises(ValueError, match="dropout_rate=0.5 needs rngs"):
        layer(x, deterministic=False)


def test_limits_are_errors():
    layer = build()
    with pytest.raises(ValueError, match="at most 7 keys"):
        layer(draw(B, L + 1, M))
    with pytest.raises(ValueError, match="cross=False takes no context"):
        layer(draw(B, L, M), context=draw(B, L, M))
    with pytest.raises(ValueError, match="at most 7 keys"):
        build(cross=True)(draw(B, L, M), context=draw(B, L + 1, M))
    with pytest.raises(ValueError, match="cross=True needs a context"):
        build(cross=True)(draw(B, L, M))
    with pytest.raises(ValueError, match="keys cannot be masked"):
        layer(draw(B, L, M), key_mask=np.ones((B, L), bool))
    with pytest.raises(ValueError, match="keys cannot be masked"):
        layer(draw(B, L, M), segment_ids=np.ones((B, L), int))
    with pytest.raises(ValueError, match="multiple of num_heads=4"):
        LinformerAttention(M, LinformerConfig(4, L), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="projected must be at least 1"):
        LinformerConfig(2, L, 0)
