"""Layers hold calibrated parameters: from samples, from running averages, through redraws."""

import dataclasses
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
    RunningMoments,
    Stack,
    StackConfig,
    SublayerConfig,
    calibrate,
    fix_projections,
    recalibrate,
    redraw,
    redraw_due,
)
from fast_attention.layers.attention.stored_projections import TrainedTuning
from fast_attention.layers.inputs import Inputs
from fast_attention.mechanisms.favor.calibration import calibrate as calibrate_function
from fast_attention.mechanisms.wrapped import WrappedAttention

B, T, H, K, D, FEATURES = 2, 8, 4, 2, 4, 16
make = functools.partial(
    make_fast_softmax_attention,
    nb_features=8,
    estimator="wderf_s",
    projection="orthogonal_antithetic",
    unidirectional=True,
)


def config(**options):
    group = HeadGroup(H, make(**options), rotary="halves")
    return AttentionConfig(groups=(group,), head_dim=D, num_kv_heads=K, causal=True)


@functools.cache
def sample():
    return jax.random.normal(jax.random.key(1), (B, T, FEATURES))


def held(module, kind=Projection):
    return jax.tree.map(np.asarray, nnx.state(module, kind))


def assert_state_close(left, right, close=True):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    assert all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs) == close


def test_a_layer_holds_the_parameters_of_its_own_queries_and_keys():
    layer = MultiHeadAttention(FEATURES, config(), rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.shape, held(layer))
    assert set(layer.projections[0]["query_shift"][...].ravel().tolist()) == {0.0}
    assert calibrate(layer, sample()) == 1
    assert jax.tree.map(jnp.shape, held(layer)) == before
    # What the attention function is given is what it was calibrated on.
    seen = {}

    class Spy(WrappedAttention):
        def attend(self, call):
            seen.update(query=call.query, key=call.key)
            return super().attend(call)

    spied = nnx.clone(layer)
    group = HeadGroup(H, Spy(layer.config.groups[0].attention_fn), rotary="halves")
    spied.config = AttentionConfig((group,), D, num_kv_heads=K, causal=True)
    spied(sample())
    expected = calibrate_function(make(), **seen, projection=layer.projections[0]["rows"][...])
    for name, x in expected._asdict().items():
        np.testing.assert_allclose(layer.projections[0][name][...], x, rtol=1e-3, atol=1e-4)


def test_padding_does_not_count():
    mask = np.arange(T)[None] < np.asarray([[T], [5]])
    wild = jnp.where(mask[..., None], sample(), 1e3)
    states = []
    for x in (sample(), wild):
        layer = MultiHeadAttention(FEATURES, config(), rngs=nnx.Rngs(0))
        calibrate(layer, x, key_mask=mask)
        states.append(held(layer))
    assert_state_close(*states)


def test_decoding_uses_what_was_calibrated():
    layer = MultiHeadAttention(FEATURES, config(), rngs=nnx.Rngs(0))
    before = layer(sample())
    calibrate(layer, sample())
    whole = layer(sample())
    assert not np.allclose(before, whole, atol=1e-3)
    places = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    state = layer.init_state(B, T)
    first, state = layer.prefill(state, sample()[:, :-1], Inputs(positions=places[:, :-1]))
    last, _ = layer.step(state, sample()[:, -1], Inputs(positions=places[:, -1]))
    together = jnp.concatenate([first, last[:, None]], 1)
    np.testing.assert_allclose(together, whole, rtol=1e-4, atol=1e-5)


def test_a_redraw_keeps_the_calibration():
    layer = MultiHeadAttention(FEATURES, config(), rngs=nnx.Rngs(0))
    calibrate(layer, sample())
    before = held(layer)["projections"][0]
    redraw(layer, nnx.Rngs(3))
    after = held(layer)["projections"][0]
    for name in ("query_shift", "key_norm", "stretch"):
        np.testing.assert_array_equal(before[name][...], after[name][...])
    assert not np.allclose(before["rows"][...], after["rows"][...])
    assert not np.allclose(before["query_weight"][...], after["query_weight"][...])


def stack(memory=0, **options):
    attention = dataclasses.replace(config(moment_decay=0.9), memory=memory)
    return Stack(
        StackConfig(FEATURES, ((SublayerConfig(attention),) * 2,), **options), rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("options", [{"memory": 3}, {"remat": True}, {"reversible": True}])
def test_running_averages_follow_training_and_rest_in_evaluation(options):
    model = stack(**options)
    start = held(model, RunningMoments)

    @nnx.jit
    def train(model, x):
        loss = lambda m: jnp.sum(m(x, deterministic=False, rngs=nnx.Rngs(0)) ** 2)  # noqa: E731
        return nnx.grad(loss)(model)

    model(sample())
    assert_state_close(start, held(model, RunningMoments))
    train(model, sample())
    assert_state_close(start, held(model, RunningMoments), close=False)
    before = held(model)
    nnx.jit(recalibrate)(model)
    after = held(model)
    assert_state_close(before, after, close=False)
    # One batch seen: the same as calibrating on it.
    other = stack(**options)
    calibrate(other, sample())
    assert_state_close(after, held(other))


def test_heads_that_saw_nothing_stay_as_they_are():
    model = stack()
    before = held(model)
    assert recalibrate(model) == 2
    assert_state_close(before, held(model))


def test_attention_over_axes_is_calibrated_too():
    attention = make(unidirectional=False, calibration="stored")
    layer = MultiAxisAttention(H, D, features=FEATURES, attention_fn=attention, rngs=nnx.Rngs(0))
    x = sample().reshape(B, 2, T // 2, FEATURES)
    before = layer(x)
    assert calibrate(layer, x) == 1
    assert not np.allclose(layer(x), before, atol=1e-3)
    redraw(layer, nnx.Rngs(1))


def test_bidirectional_layers_need_no_calibration():
    group = HeadGroup(H, make(unidirectional=False))
    layer = MultiHeadAttention(FEATURES, AttentionConfig((group,), D), rngs=nnx.Rngs(0))
    assert layer.projections[0][...].shape == (4, D)
    assert np.isfinite(layer(sample())).all()
    with pytest.raises(ValueError, match="no attention with stored parameters"):
        calibrate(layer, sample())
    with pytest.raises(ValueError, match="keeps no running moments"):
        recalibrate(layer)


def trained_layer():
    return MultiHeadAttention(FEATURES, config(calibration="trained"), rngs=nnx.Rngs(0))


def test_trained_parameters_are_parameters_of_the_layer():
    layer = trained_layer()
    names = {"query_shift", "key_shift", "norm", "spread", "keep"}
    assert set(held(layer, TrainedTuning)["projections"][0]) == names
    assert set(held(layer, Projection)["projections"][0]) == {"rows"}
    graphdef, parameters, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def gradient(parameters, x):
        loss = lambda p: jnp.sum(nnx.merge(graphdef, p, rest)(x) ** 2)  # noqa: E731
        return jax.grad(loss)(parameters)

    slopes = gradient(parameters, sample())["projections"][0]
    assert set(slopes) == names
    assert all(np.abs(slopes[name][...]).max() > 1e-6 for name in names)


def test_training_goes_on_from_the_calibration_and_a_redraw_keeps_it():
    layer = trained_layer()
    plain = MultiHeadAttention(FEATURES, config(), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(sample()), plain(sample()), rtol=1e-3, atol=1e-4)
    start = held(layer, TrainedTuning)
    assert calibrate(layer, sample()) == 1
    found = held(layer, TrainedTuning)
    assert_state_close(start, found, close=False)
    rows = held(layer)
    redraw(layer, nnx.Rngs(3))
    assert_state_close(found, held(layer, TrainedTuning))
    assert_state_close(rows, held(layer), close=False)
    whole = layer(sample())
    places = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    first, state = layer.prefill(
        layer.init_state(B, T), sample()[:, :-1], Inputs(positions=places[:, :-1])
    )
    last, _ = layer.step(state, sample()[:, -1], Inputs(positions=places[:, -1]))
    together = jnp.concatenate([first, last[:, None]], 1)
    np.testing.assert_allclose(together, whole, rtol=1e-4, atol=1e-5)


def test_running_averages_are_used_at_their_interval():
    model = stack(recalibrate_interval=3)
    nnx.jit(lambda m, x: m(x, deterministic=False, rngs=nnx.Rngs(0)))(model, sample())
    start = held(model)
    assert not redraw_due(model, 2, nnx.Rngs(0))
    assert_state_close(start, held(model))
    assert not redraw_due(model, 3, nnx.Rngs(0))
    assert_state_close(start, held(model), close=False)
    with pytest.raises(ValueError, match="recalibrate_interval must be at least 1.*got 0"):
        stack(recalibrate_interval=0)


def test_fixed_projections_follow_no_running_averages():
    model = stack(recalibrate_interval=3, redraw_interval=3)
    nnx.jit(lambda m, x: m(x, deterministic=False, rngs=nnx.Rngs(0)))(model, sample())
    start = held(model)
    fix_projections(model)
    assert not redraw_due(model, 3, nnx.Rngs(0))
    assert_state_close(start, held(model))
