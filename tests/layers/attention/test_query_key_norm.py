"""Queries and keys of one length: the bound, the temperature, and that nothing else changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention, make_local_attention
from fast_attention.layers import (
    AttentionConfig,
    HeadGroup,
    Inputs,
    MultiHeadAttention,
    UnitQueryKey,
)
from fast_attention.models import TransformerConfig
from tests.layers.definitions import compiled, draw, filled

B, T, M, D, K = 2, 7, 6, 4, 3


def temperatures(module):
    return np.exp(np.asarray(module.log_temperature[...], np.float64))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_squared_lengths_are_the_temperature_whatever_comes_in(dtype):
    """``x = q D^(-1/4)`` has ``|x|^2 = tau``: so ``|x + y|^2 <= 4 tau``."""
    module = filled(lambda: UnitQueryKey(K))
    tau = temperatures(module)
    for heads in (K, 2 * K):
        for size in (1e-3, 1.0, 1e3):
            x = jnp.asarray(draw(B, T, heads, D) * size, dtype)
            out = module(x)
            assert out.dtype == dtype
            scaled = np.asarray(out, np.float64) * D**-0.25
            expected = np.broadcast_to(np.repeat(tau, heads // K), (B, T, heads))
            np.testing.assert_allclose((scaled**2).sum(-1), expected, rtol=3e-2, atol=0)
            if dtype == jnp.float32:
                np.testing.assert_allclose((scaled**2).sum(-1), expected, rtol=1e-5)
                cosine = np.sum(scaled * np.asarray(x), -1) / np.linalg.norm(x, axis=-1)
                np.testing.assert_allclose(cosine, np.sqrt(expected), rtol=1e-5)


def test_logits_are_cosines_at_first_and_zeros_have_gradients():
    module = UnitQueryKey(K)
    q, k = jnp.asarray(draw(T, K, D)), jnp.asarray(draw(T, K, D, seed=1))
    logits = jnp.einsum("thd,shd->hts", module(q), module(k)) * D**-0.5
    norms = [np.linalg.norm(x, axis=-1) for x in (q, k)]
    cosines = np.einsum("thd,shd->hts", q, k) / np.einsum("th,sh->hts", *norms)
    np.testing.assert_allclose(logits, cosines, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(module(x) ** 3))(jnp.zeros((1, K, D)))
    assert np.isfinite(gradient).all()


FUNCTIONS = (
    HeadGroup(2, rotary="halves"),
    HeadGroup(2, make_fast_softmax_attention(nb_features=8, exact_window=2), rotary="halves"),
    HeadGroup(2, make_local_attention(3)),
)


def build(**options: Any):
    config = AttentionConfig(
        FUNCTIONS, D, num_kv_heads=K, causal=True, **({"qk_norm": "unit"} | options)
    )
    return filled(lambda: MultiHeadAttention(M, config, rngs=nnx.Rngs(0)))


def test_decoding_equals_the_whole_and_gradients_reach_the_temperature():
    layer, x = build(), draw(B, T, M)
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))

    @compiled
    def both(layer, x):
        def steps(state, token):
            x, place = token
            out, state = layer.step(state, x, Inputs(positions=place))
            return state, out

        tokens = jnp.swapaxes(x, 0, 1), positions.T
        _, out = jax.lax.scan(steps, layer.init_state(B, T), tokens)
        gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
        return jnp.swapaxes(out, 0, 1), layer(x), gradient

    out, whole, gradient = both(layer, x)
    np.testing.assert_allclose(out, whole, atol=5e-6)
    slope = gradient["project"]["unit_norm"]["log_temperature"][...]
    assert slope.shape == (K,) and (np.asarray(slope) != 0).all()


def test_a_larger_input_projection_changes_nothing():
    layer, x = build(), draw(B, T, M)
    before = layer(x)
    for part in (layer.project.query, layer.project.key):
        part.kernel[...] = part.kernel[...] * 50
    np.testing.assert_allclose(layer(x), before, atol=1e-5)


def test_models_have_it_by_one_field_and_not_by_themselves():
    def heads(**options: Any):
        block = TransformerConfig(vocab_size=5, **options).language_model().stack.blocks[0]
        attention = block[0].inner
        assert isinstance(attention, AttentionConfig)
        return attention.qk_norm

    assert heads() is None
    assert heads(qk_norm=True) == "unit"
    with pytest.raises(ValueError, match="qk_norm must be True or False, got 'yes'"):
        heads(qk_norm="yes")
    with pytest.raises(ValueError, match="'unit', 'rms' or None, got True"):
        build(qk_norm=True)
