"""The Transformer against its definition in numpy, and what its configuration decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.models import Transformer, TransformerConfig
from tests.layers import definitions
from tests.layers.definitions import compiled, filled

V, B, T = 5, 2, 6
TOKENS = np.array([[0, 1, 2, 3, 4, 0], [4, 4, 2, 1, 3, 0]])

KINDS = {
    "learned": {"positions": "learned", "activation": "relu"},
    "sinusoidal": {"positions": "sinusoidal", "tie_embeddings": True},
    "rotary": {"positions": "rotary", "num_kv_heads": 1, "shift_tokens": True},
    "none": {"positions": "none", "causal": False, "activation": "silu"},
}


def build(**options):
    sizes = {
        "emb_dim": 6,
        "num_heads": 2,
        "num_layers": 2,
        "qkv_dim": 8,
        "mlp_dim": 10,
        "max_len": T,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
    }
    config = TransformerConfig(vocab_size=V, **(sizes | options))
    return filled(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def parameters(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind):
    model = build(**KINDS[kind])
    expected = [definitions.transformer(model, row) for row in TOKENS]
    np.testing.assert_allclose(compiled(model)(TOKENS), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_parameters_follows_from_the_configuration(kind):
    model = build(**KINDS[kind])
    c = model.config
    attention = 2 * c.emb_dim * c.qkv_dim + 2 * c.emb_dim * c.kv_heads * c.head_dim
    feed_forward = 2 * c.emb_dim * c.mlp_dim + c.mlp_dim + c.emb_dim
    block = attention + feed_forward + 2 * 2 * c.emb_dim
    expected = V * c.emb_dim + c.num_layers * block + 2 * c.emb_dim
    expected += c.max_len * c.emb_dim if c.positions == "learned" else 0
    expected += 0 if c.tie_embeddings else c.emb_dim * V + V
    assert sum(x.size for x in parameters(model)) == expected


def test_layers_start_with_parameters_of_their_own():
    config = TransformerConfig(V, emb_dim=6, num_heads=2, num_layers=3, qkv_dim=8, mlp_dim=10)
    state = compiled(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(0)).stack))()
    kernels = [x for x in jax.tree.leaves(state) if x.ndim == 2]
    assert len({np.asarray(x).tobytes() for x in kernels}) == len(kernels) == 3 * 6


def test_gradients_reach_every_parameter():
    model = build(positions="learned", shift_tokens=True, num_kv_heads=1)

    @compiled
    @nnx.grad
    def gradient(model):
        return jnp.sum(model(TOKENS) ** 2)

    for x in parameters(gradient(model)):
        assert np.all(np.isfinite(x)) and np.all(np.any(x != 0, axis=-1))


def test_remat_changes_no_number():
    def differentiate(remat):
        @compiled
        @nnx.value_and_grad
        def step(model):
            out = model(TOKENS, deterministic=False, rngs=nnx.Rngs(0))
            return jnp.sum(out**2)

        model = build(remat=remat, num_layers=1, **KINDS["rotary"])
        assert model.stack.config.remat == remat
        return step(model)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        *(differentiate(remat) for remat in (True, False)),
    )


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_logits_are_float32_whatever_the_model_computes_in(kind):
    model = build(dtype=jnp.bfloat16, **KINDS[kind])
    assert jax.eval_shape(model.encode, TOKENS).dtype == jnp.bfloat16
    state = jax.eval_shape(lambda: model.init_state(B, T))
    step, _ = jax.eval_shape(model.step, state, TOKENS[:, 0])
    prefill, _ = jax.eval_shape(model.prefill, state, TOKENS)
    whole = jax.eval_shape(model, TOKENS)
    assert all(x.dtype == jnp.float32 for x in (whole, step, prefill, *parameters(model)))


def test_dropout_hits_the_embeddings_by_its_key():
    model, without = build(dropout_rate=0.5, positions="none"), build(positions="none")
    for (
        attention,
        feed_forward,
    ) in model.stack.blocks:  # Nothing is added to the embeddings, and no norm follows.
        for layer in (attention.inner.out, feed_forward.inner.down):
            nnx.update(layer, jax.tree.map(jnp.zeros_like, nnx.state(layer)))
    model.norm = without.norm = nnx.identity

    @compiled
    def dropped(seed):
        rngs = nnx.Rngs(dropout=jax.random.key(seed))
        return model.encode(TOKENS, deterministic=False, rngs=rngs)

    out, embedded = np.asarray(dropped(0)), definitions.array(model.embed.embedding)[TOKENS]
    kept = out != 0
    assert 0.25 < kept.mean() < 0.75
    np.testing.assert_allclose(out, np.where(kept, 2 * embedded, 0), atol=1e-6)
    np.testing.assert_array_equal(dropped(0), out)
    assert np.any((dropped(1) != 0) != kept)


def test_no_dropout_is_the_default_and_dropout_needs_a_key():
    model = build(dropout_rate=0.5, attention_dropout_rate=0.5)
    expected = [definitions.transformer(model, row) for row in TOKENS]
    np.testing.assert_allclose(compiled(model)(TOKENS), expected, rtol=2e-6, atol=2e-6)
    with pytest.raises(ValueError, match="^dropout_rate=0.5 needs rngs"):
        jax.eval_shape(lambda: model(TOKENS, deterministic=False))


def test_only_learned_positions_limit_the_length():
    longer = np.zeros((1, T + 1), int)
    learned = build()
    for function in (lambda: learned(longer), lambda: learned.init_state(1, T + 1)):
        with pytest.raises(ValueError, match=f"{T + 1} tokens .* max_len={T} learned"):
            function()
    other = build(positions="sinusoidal")
    assert jax.eval_shape(other, longer).shape == (1, T + 1, V)
    jax.eval_shape(lambda: other.init_state(1, T + 1))


def test_positions_that_start_again_are_not_longer_than_the_table():
    model = build()
    packed = np.concatenate([TOKENS, TOKENS], axis=1)
    options = {
        "positions": np.tile(np.arange(T), (B, 2)),
        "segment_ids": np.repeat([[1, 2]], T, axis=1).repeat(B, axis=0),
    }
    out = compiled(lambda tokens: model(tokens, **options))(packed)
    expected = [np.tile(definitions.transformer(model, row), (2, 1)) for row in TOKENS]
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)
