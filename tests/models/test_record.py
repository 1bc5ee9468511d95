"""Recorded weights are those that the layers use."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
)
from fast_attention.layers import (
    AttentionConfig,
    HeadGroup,
    MultiHeadAttention,
    Stack,
    StackConfig,
    SublayerConfig,
)
from fast_attention.mechanisms.efficient.fn import make_efficient_attention
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.mechanisms.strided.fn import make_strided_attention
from fast_attention.models import ReformerLM, plot_recordings, record
from fast_attention.softmax_attention import make_softmax_attention
from tests.layers.definitions import array, draw, filled, linear
from tests.models.cases import LM, build, tokens

B, T, M = 2, 7, 8
X = draw(B, T, M)
MASK = np.arange(T)[None] < np.array([[7], [5]])
MECHANISMS = {
    "exact": make_softmax_attention(),
    "softmax": make_fast_softmax_attention(nb_features=6),
    "generalized": make_fast_generalized_attention(nb_features=6),
    "efficient": make_efficient_attention(),
    "local": make_local_attention(3),
    "strided": make_strided_attention(make_softmax_attention(), 3),
}


def layer(function, **options):
    config = AttentionConfig((HeadGroup(2, function),), 4, **options)
    return filled(lambda: MultiHeadAttention(M, config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MECHANISMS)
def test_weights_are_a_distribution_over_what_is_seen_and_give_the_output(name, causal):
    attention = layer(MECHANISMS[name], causal=causal)
    (recorded,) = record(attention, X, key_mask=MASK)
    assert recorded.path == () and recorded.group == 0 and recorded.buckets is None
    weights = np.asarray(recorded.weights)
    assert weights.shape == (B, 2, T, T) and weights.dtype == np.float32
    np.testing.assert_allclose(weights[0].sum(-1), 1, atol=1e-5)
    assert not weights[1, :, :, 5:].any()
    if causal:
        assert not np.triu(weights, 1).any()
    value = linear(attention.project.value, X).reshape(B, T, 2, 4)
    out = np.einsum("bhts,bshd->bthd", weights, value).reshape(B, T, 8)
    expected = np.asarray(attention(X, key_mask=MASK))
    np.testing.assert_allclose((out @ array(attention.out.kernel))[0], expected[0], atol=2e-5)


def test_weights_of_exact_attention_are_the_softmax():
    attention = layer(make_softmax_attention(), causal=True)
    query, key = (
        linear(part, X).reshape(B, T, 2, 4)
        for part in (attention.project.query, attention.project.key)
    )
    scores = np.einsum("bthd,bshd->bhts", query, key) / 2
    expected = np.where(np.tri(T), np.exp(scores), 0)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(record(attention, X)[0].weights, expected, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["exact", "softmax", "efficient"])
def test_memory_stands_behind_the_sequence(name, causal):
    attention = layer(MECHANISMS[name], causal=causal, memory=2)
    weights = np.asarray(record(attention, X)[0].weights)
    assert weights.shape == (B, 2, T, T + 2)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.all(weights[..., T:] > 0)
    if causal:
        assert not np.triu(weights[..., :T], 1).any()
    _, _, value = attention.project(X)
    out = jnp.einsum("bhts,bshd->bthd", weights, value).reshape(B, T, 8)
    np.testing.assert_allclose(attention.out(out), attention(X), atol=2e-5)


def test_hashed_layers_have_buckets_and_a_tied_layer_is_recorded_each_time():
    options = {"causal": True, "bucket_size": 4, "n_hashes": 3, "weight_tie": True, "depth": 2}
    model = build(ReformerLM, **(LM | options | {"num_mem_kv": 1, "ff_chunks": 1}))
    before = jax.tree.leaves(nnx.state(model))
    recordings = record(model, tokens(B, 16))
    assert len(recordings) == 2 and recordings[0].path == recordings[1].path
    assert np.any(recordings[0].weights != recordings[1].weights)
    for recorded in recordings:
        # 17 keys are 6 chunks: buckets come in pairs.
        assert recorded.buckets.shape == (B, 2, 3, 17)
        assert 0 <= np.min(recorded.buckets) < np.max(recorded.buckets) < 6
        np.testing.assert_allclose(recorded.weights.sum(-1), 1, atol=1e-5)
        assert not np.triu(recorded.weights[..., :16], 1).any()
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_groups_and_recomputed_layers_are_recorded_one_by_one():
    groups = HeadGroup(1, make_local_attention(3)), HeadGroup(2, MECHANISMS["softmax"])
    block = (SublayerConfig(AttentionConfig(groups, 4)),)
    stack = filled(lambda: Stack(StackConfig(M, (block,) * 2, remat=True), rngs=nnx.Rngs(0)))
    recordings = record(stack, X)
    assert [r.path for r in recordings] == [("blocks", block, 0, "inner") for block in (0, 0, 1, 1)]
    assert [r.group for r in recordings] == [0, 1, 0, 1]
    assert [r.weights.shape[1] for r in recordings] == [1, 2, 1, 2]
    assert stack.config.remat


def test_recordings_make_a_picture(tmp_path, monkeypatch):
    model = build(ReformerLM, **(LM | {"bucket_size": 4, "depth": 1, "n_local_attn_heads": 1}))
    recordings = record(model, tokens(B, 16))
    plot_recordings(recordings, tmp_path / "all.png", row=1)
    plot_recordings(recordings[1], tmp_path / "one.png", head=0)
    sizes = [(tmp_path / name).read_bytes()[16:24] for name in ("all.png", "one.png")]
    assert int.from_bytes(sizes[0][:4], "big") > int.from_bytes(sizes[1][:4], "big") > 100
    with pytest.raises(ValueError, match="0 to 1, got 2"):
        plot_recordings(recordings, tmp_path / "no.png", row=2)
    with pytest.raises(ValueError, match="0 to 0, got 1"):
        plot_recordings(recordings, tmp_path / "no.png", head=1)
    with pytest.raises(ValueError, match="no recordings"):
        plot_recordings([], tmp_path / "no.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fast-attention\[protein\]'"):
        plot_recordings(recordings, tmp_path / "no.png")
