"""Layers whose heads decay: their kinds, decoding, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
    make_local_attention,
    make_softmax_attention,
)
from fast_attention.layers import AttentionConfig, HeadGroup, MultiHeadAttention, decay_slopes
from fast_attention.layers.inputs import Inputs
from fast_attention.models.config import TransformerConfig
from fast_attention.models.transformer import Transformer

B, T, H, K, D, M = 2, 7, 4, 2, 4, 12
KINDS = ("fixed", "learned", "token")

linear = make_fast_softmax_attention(D, nb_features=8)
near = make_fast_softmax_attention(D, nb_features=8, exact_window=2)
relu = make_fast_generalized_attention(D, nb_features=8)


def layer(kind, groups=None, **options):
    groups = groups or (HeadGroup(2, linear), HeadGroup(2, relu))
    config = AttentionConfig(
        groups, D, **({"num_kv_heads": K, "causal": True, "decay": kind} | options)
    )
    made = MultiHeadAttention(M, config, rngs=nnx.Rngs(0))
    if made.decay is not None and made.decay.kernel is not None:
        # Zeros at first would not tell tokens apart.
        kernel = jax.random.normal(jax.random.key(1), made.decay.kernel.shape)
        made.decay.kernel[...] = kernel
    return made


def stream():
    return jax.random.normal(jax.random.key(2), (B, T, M))


@pytest.mark.parametrize("kind", KINDS)
def test_decay_of_a_layer_is_that_of_its_functions(kind):
    made, x = layer(kind), stream()
    query, key, value = made.project(x)
    log_decay = jnp.broadcast_to(made.decay(x), (B, T, K))
    assert (log_decay < 0).all()
    parts = [
        function(
            query[:, :, 2 * n : 2 * n + 2],
            key[:, :, n : n + 1],
            value[:, :, n : n + 1],
            is_causal=True,
            log_decay=log_decay[..., n : n + 1],
            **made._own(n),
        )
        for n, function in enumerate((linear, relu))
    ]
    np.testing.assert_allclose(made(x), made._merge(parts), atol=1e-6)
    plain = layer(None)
    assert jnp.abs(made(x) - plain(x)).max() > 1e-3


def test_all_kinds_start_from_the_same_slopes():
    x = stream()
    config = AttentionConfig((HeadGroup(4, linear),), D, causal=True)
    for kind in KINDS:
        own = AttentionConfig(config.groups, D, causal=True, decay=kind)
        made = MultiHeadAttention(M, own, rngs=nnx.Rngs(0))
        found = jnp.broadcast_to(made.decay(x), (B, T, 4))
        expected = np.broadcast_to(-decay_slopes(4), (B, T, 4))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(decay_slopes(4), [1 / 4, 1 / 16, 1 / 64, 1 / 256])


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_are_the_whole(kind):
    """With padding in front of the prompt of one row, which neither adds nor decays."""
    made, x = layer(kind), stream()
    mask = jnp.arange(T)[None] >= jnp.array([[0], [2]])
    whole = made(x, key_mask=mask)
    state = made.init_state(B, T)
    prompt, state = made.prefill(state, x[:, :4], Inputs(key_mask=mask[:, :4]))
    outputs = [prompt]
    for t in range(4, T):
        out, state = made.step(state, x[:, t])
        outputs.append(out[:, None])
    found = jnp.concatenate(outputs, axis=1)
    np.testing.assert_allclose(found[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(found[1, 2:], whole[1, 2:], atol=1e-5)


@pytest.mark.parametrize("kind", ["learned", "token"])
def test_decays_are_learned(kind):
    made = layer(kind)
    gradient = nnx.grad(lambda made: (made(stream()) ** 2).sum())(made)
    for leaf in jax.tree.leaves(gradient["decay"]):
        assert jnp.abs(leaf).min() > 0


def test_local_heads_beside_decaying_ones():
    groups = HeadGroup(2, linear), HeadGroup(2, make_local_attention(2))
    made, x = layer("token", groups), stream()
    assert made(x).shape == x.shape
    before = layer(None, groups)
    query, key, value = before.project(x)
    np.testing.assert_array_equal(
        [y.shape for y in (query, key, value)], [(B, T, H, D), (B, T, K, D), (B, T, K, D)]
    )


def test_refusals():
    with pytest.raises(ValueError, match="causal"):
        layer("fixed", causal=False)
    with pytest.raises(ValueError, match="decay must be"):
        layer("alibi")
    with pytest.raises(ValueError, match="at least one group of heads"):
        layer("fixed", (HeadGroup(4, make_softmax_attention()),))
    with pytest.raises(ValueError, match="memory"):
        layer("fixed", memory=2)
    x = jnp.ones((B, T, H, D))
    for function in (make_softmax_attention(True), make_local_attention(2, True)):
        with pytest.raises(ValueError, match="log_decay must be None"):
            function(x, x, x, is_causal=True, log_decay=jnp.zeros(H))
    with pytest.raises(ValueError, match="log_decay must be of shape"):
        linear(x, x, x, is_causal=True, log_decay=jnp.zeros(3))
    with pytest.raises(ValueError, match="causal=True"):
        linear(x, x, x, log_decay=jnp.zeros(H))


def test_axes_of_a_call_are_folded():
    x = jax.random.normal(jax.random.key(0), (B, 2, 3, H, D))
    log_decay = -jax.random.uniform(jax.random.key(1), (B, 2, 3, H))
    found = linear(x, x, x, is_causal=True, axis=(1, 2), log_decay=log_decay)
    flat = x.reshape(B, 6, H, D)
    expected = linear(flat, flat, flat, is_causal=True, log_decay=log_decay.reshape(B, 6, H))
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "function"), [("fixed", linear), ("token", near)])
def test_whole_model(kind, function):
    """A model decodes to the logits of one call."""
    config = TransformerConfig(
        11, emb_dim=8, num_heads=2, num_layers=2, qkv_dim=8, mlp_dim=8, max_len=8, decay=kind
    )
    model = Transformer(config, function, rngs=nnx.Rngs(0))
    tokens = jnp.arange(2 * 6).reshape(2, 6) % 11
    whole = model(tokens, deterministic=True)
    state = model.init_state(2, 8)
    logits, state = model.prefill(state, tokens[:, :3])
    np.testing.assert_allclose(logits, whole[:, :3], atol=1e-5)
    for t in range(3, 6):
        logits, state = model.step(state, tokens[:, t])
        np.testing.assert_allclose(logits, whole[:, t], atol=1e-5)
    with pytest.raises(ValueError, match="decay must be one of"):
        TransformerConfig(11, decay="alibi")
