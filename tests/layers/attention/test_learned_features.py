"""Layers hold learned features as parameters of each key head: trained, redrawn, decoded with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.layers import (
    AttentionConfig,
    HeadGroup,
    MultiAxisAttention,
    MultiHeadAttention,
    Projection,
    redraw,
)
from fast_attention.layers.attention.stored_projections import TrainedTuning
from fast_attention.layers.inputs import Inputs

B, T, H, K, D, FEATURES = 2, 7, 4, 2, 4, 16
LEARNED = pytest.mark.parametrize(
    ("estimator", "window", "shapes"),
    [
        ("hedgehog", None, {"query_weight": (K, 3, D), "key_weight": (K, 3, D)}),
        (
            "hedgehog",
            2,
            {"query_weight": (K, 3, D), "key_weight": (K, 3, D), "log_scale": (K,)},
        ),
        ("darkformer", None, {"matrix": (K, D, D)}),
    ],
)


def make_layer(estimator, window):
    function = make_fast_softmax_attention(
        nb_features=6, estimator=estimator, exact_window=window, unidirectional=True
    )
    group = HeadGroup(H, function, rotary="halves")
    config = AttentionConfig((group,), D, num_kv_heads=K, causal=True)
    return MultiHeadAttention(FEATURES, config, rngs=nnx.Rngs(0))


@functools.cache
def sample():
    return jax.random.normal(jax.random.key(1), (B, T, FEATURES))


def held(module, kind):
    (state,) = nnx.state(module, kind)["projections"].values()
    return {name: np.asarray(x[...]) for name, x in state.items()}


@LEARNED
def test_they_are_parameters_that_gradients_reach(estimator, window, shapes):
    layer = make_layer(estimator, window)
    assert {name: x.shape for name, x in held(layer, TrainedTuning).items()} == shapes
    graphdef, parameters, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def gradient(parameters, x):
        loss = lambda p: jnp.sum(nnx.merge(graphdef, p, rest)(x) ** 2)  # noqa: E731
        return jax.grad(loss)(parameters)

    slopes = gradient(parameters, sample())["projections"][0]
    # Each head has a slope of its own.
    assert all((np.abs(slopes[name][...]).reshape(K, -1).max(-1) > 1e-6).all() for name in shapes)


@LEARNED
def test_a_redraw_leaves_what_was_learned_and_decoding_uses_it(estimator, window, shapes):
    layer = make_layer(estimator, window)
    rng = np.random.default_rng(0)
    for name in shapes:
        leaf = layer.projections[0][name]
        leaf[...] = leaf[...] + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    before = held(layer, TrainedTuning)
    out = layer(sample())
    redraw(layer, nnx.Rngs(3))
    after = held(layer, TrainedTuning)
    assert all(np.array_equal(before[name], after[name]) for name in shapes)
    whole = layer(sample())
    assert np.allclose(out, whole) == (estimator == "hedgehog")
    places = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    first, state = layer.prefill(
        layer.init_state(B, T), sample()[:, :-1], Inputs(positions=places[:, :-1])
    )
    last, _ = layer.step(state, sample()[:, -1], Inputs(positions=places[:, -1]))
    together = jnp.concatenate([first, last[:, None]], 1)
    np.testing.assert_allclose(together, whole, rtol=1e-4, atol=1e-5)


def test_attention_over_several_axes_holds_them_too():
    function = make_fast_softmax_attention(nb_features=6, estimator="darkformer")
    layer = MultiAxisAttention(2, 4, features=FEATURES, attention_fn=function, rngs=nnx.Rngs(0))
    assert layer.projection["matrix"].shape == (2, 4, 4)
    assert isinstance(layer.projection["rows"], Projection)
    x = sample().reshape(1, B, T, FEATURES)
    before = layer(x)
    layer.redraw(nnx.Rngs(2))
    assert not np.allclose(before, layer(x))
