"""The same parameters around another attention function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.layers import (
    AttentionConfig,
    HeadGroup,
    MultiHeadAttention,
    RunningMoments,
    calibrate,
    with_attention,
)
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.mechanisms.lsh.fn import make_lsh_attention
from fast_attention.models import Transformer, TransformerConfig
from fast_attention.softmax_attention import make_softmax_attention

T = 24
TOKENS = jax.random.randint(jax.random.key(3), (2, T), 0, 7)
WDERF = make_fast_softmax_attention(
    nb_features=16,
    estimator="wderf_s",
    projection="orthogonal_antithetic",
    unidirectional=True,
    moment_decay=0.9,
)
SHAPE = {
    "vocab_size": 7,
    "emb_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "qkv_dim": 16,
    "mlp_dim": 16,
    "positions": "rotary",
}


@pytest.fixture(scope="module")
def exact():
    model = Transformer(TransformerConfig(**SHAPE), rngs=nnx.Rngs(0))
    # Queries that tell keys apart, as those of a trained model do.
    for block in model.stack.blocks:
        kernel = block[0].inner.project.query.kernel
        kernel[...] = 4 * kernel[...]
    return model


def arrays(model, kind=nnx.Param):
    return nnx.to_pure_dict(nnx.state(model, kind))


@nnx.jit
def logits(model):
    return model(TOKENS)


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_parameters_are_the_same_and_not_shared(exact):
    before = jax.tree.map(np.asarray, arrays(exact))
    performer = with_attention(exact, WDERF, nnx.Rngs(1))
    assert_equal(arrays(performer), before)
    built = Transformer(TransformerConfig(**SHAPE), WDERF, rngs=nnx.Rngs(1))
    for kind in (nnx.Param, nnx.Not(nnx.Param), RunningMoments):
        shapes = [jax.tree.map(jnp.shape, arrays(model, kind)) for model in (performer, built)]
        assert shapes[0] == shapes[1]
    # Layers draw their own, and what stands around them knows of the new function.
    rows = [block[0].inner.projections[0]["rows"][...] for block in performer.stack.blocks]
    assert not np.array_equal(*rows)
    assert performer.shape.stack == performer.stack.config
    assert performer.stack.config.blocks[0][0].inner.groups[0].attention_fn is WDERF
    assert performer.can_decode
    performer.embed.embedding[...] = jnp.zeros_like(performer.embed.embedding[...])
    assert_equal(arrays(exact), before)
    assert not jax.tree.leaves(arrays(exact, nnx.Not(nnx.Param)))


def test_there_and_back(exact):
    performer = with_attention(exact, WDERF, nnx.Rngs(1))
    back = with_attention(performer, make_softmax_attention(), nnx.Rngs(2))
    assert not jax.tree.leaves(arrays(back, nnx.Not(nnx.Param)))
    np.testing.assert_array_equal(logits(back), logits(exact))


def test_a_window_over_everything_is_the_exact_model(exact):
    window = make_fast_softmax_attention(nb_features=8, unidirectional=True, exact_window=T)
    switched = with_attention(exact, window, nnx.Rngs(1))
    np.testing.assert_allclose(logits(switched), logits(exact), rtol=1e-4, atol=1e-4)


def test_calibration_brings_the_logits_nearer(exact):
    performer = with_attention(exact, WDERF, nnx.Rngs(1))
    expected = logits(exact)

    def error():
        return float(jnp.linalg.norm(logits(performer) - expected) / jnp.linalg.norm(expected))

    before = error()
    nnx.jit(calibrate)(performer, TOKENS)
    assert error() < 0.8 * before


def test_some_groups_of_heads_may_keep_theirs():
    groups = (HeadGroup(1, make_local_attention(4)), HeadGroup(1))
    layer = MultiHeadAttention(8, AttentionConfig(groups, 4), rngs=nnx.Rngs(0))
    fast = make_fast_softmax_attention(nb_features=4)

    def is_exact(group):
        return group.attention_fn == make_softmax_attention()

    switched = with_attention(layer, fast, nnx.Rngs(1), where=is_exact)
    assert [group.attention_fn for group in switched.config.groups] == [
        groups[0].attention_fn,
        fast,
    ]
    assert switched.projections[0] is None
    assert switched.projections[1].shape == (4, 4)
    with pytest.raises(ValueError, match="where= selected none"):
        with_attention(layer, fast, nnx.Rngs(1), where=lambda group: False)


def test_what_would_be_another_model_is_refused():
    layer = MultiHeadAttention(8, AttentionConfig((HeadGroup(2),), 4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sees later positions"):
        with_attention(layer, WDERF, nnx.Rngs(1))
    shared = AttentionConfig((HeadGroup(2, make_lsh_attention()),), 4, shared_qk=True, causal=True)
    layer = MultiHeadAttention(8, shared, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="shared queries and keys"):
        with_attention(layer, WDERF, nnx.Rngs(1))
    with pytest.raises(ValueError, match="no MultiHeadAttention"):
        with_attention(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), WDERF, nnx.Rngs(1))
