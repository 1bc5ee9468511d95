"""What holds in `nnx.MultiHeadAttention` and in `linen.MultiHeadDotProductAttention` alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hosts.adapters import (
    BATCH,
    FEATURES,
    HEADS,
    HOSTS,
    LENGTH,
    SOFTMAX,
    assert_close,
    directions,
    in_turn,
    inputs,
    mechanisms,
    pair,
)
from tests.leaks import checking_leaks

pytestmark = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)


@mechanisms
@directions
def test_equals_the_definition(host, mechanism, unidirectional):
    parameters, apply, define = pair(host, mechanism, unidirectional=unidirectional)
    x = inputs()
    assert_close(apply(parameters, x), define(parameters, x))


@in_turn
def test_gradients_equal_the_definitions(host, mechanism, unidirectional):
    parameters, apply, define = pair(host, mechanism, unidirectional=unidirectional)
    x, target = inputs(), inputs(seed=2)

    def gradient(function):
        def loss(parameters, x):
            return jnp.mean((function(parameters, x) - target) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(parameters, x)

    jax.tree.map(assert_close, gradient(apply), gradient(define))


def test_gradient_steps_lower_a_loss(host):
    parameters, apply, _ = pair(host, SOFTMAX, unidirectional=True)
    x, target = inputs(), inputs(seed=2)

    @jax.jit
    def step(parameters):
        loss, gradient = jax.value_and_grad(
            lambda parameters: jnp.mean((apply(parameters, x) - target) ** 2)
        )(parameters)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient)

    losses = []
    for _ in range(5):
        loss, parameters = step(parameters)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]


@mechanisms
def test_cross_attention_of_another_length(host, mechanism):
    parameters, apply, define = pair(host, mechanism)
    x, memory = inputs(), inputs(BATCH, LENGTH + 6, seed=2)
    assert_close(apply(parameters, x, memory), define(parameters, x, memory))


def test_leading_dimensions_are_batch(host):
    parameters, apply, _ = pair(host, SOFTMAX, unidirectional=True)
    x = inputs(2, 3, LENGTH)
    rows = jnp.stack([jnp.stack([apply(parameters, row) for row in grid]) for grid in x])
    assert_close(apply(parameters, x), rows)


@directions
def test_several_axes_are_one_in_row_major_order(host, unidirectional):
    ours = functools.partial(SOFTMAX.make(unidirectional=unidirectional), axis=(-4, -3))
    parameters, apply = host.build(ours)
    _, flat, _ = pair(host, SOFTMAX, unidirectional=unidirectional)
    x = inputs(BATCH, 3, 5)
    expected = flat(parameters, x.reshape(BATCH, 15, FEATURES)).reshape(BATCH, 3, 5, FEATURES)
    assert_close(apply(parameters, x), expected)


def test_bfloat16_in_bfloat16_out(host):
    parameters, low, _ = pair(host, SOFTMAX, unidirectional=True, dtype=jnp.bfloat16)
    _, full, _ = pair(host, SOFTMAX, unidirectional=True)
    x = inputs()
    out = low(parameters, x)
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), full(parameters, x), tolerance=4e-2)
    gradient = jax.grad(lambda x: jnp.sum(low(parameters, x).astype(jnp.float32)))(100 * x)
    assert np.all(np.isfinite(gradient))


@mechanisms
def test_rows_do_not_depend_on_the_batch(host, mechanism):
    parameters, apply, _ = pair(host, mechanism, unidirectional=True)
    x = inputs()
    np.testing.assert_array_equal(
        apply(parameters, x)[:1], apply(parameters, x.at[1].multiply(50.0))[:1]
    )


@mechanisms
def test_the_past_is_bit_equal_under_any_future(host, mechanism):
    parameters, apply, _ = pair(host, mechanism, unidirectional=True)
    x = inputs()
    np.testing.assert_array_equal(
        apply(parameters, x)[:, :6], apply(parameters, x.at[:, 6:].multiply(1e4))[:, :6]
    )


def test_heads_do_not_mix(host):
    parameters, apply, _ = pair(host, SOFTMAX, unidirectional=True)
    seen = []

    def record(query, key, value, **_):
        seen.append((query, key, value))
        return value

    _, recording = host.build(record)
    recording(parameters, inputs())
    attend = jax.jit(SOFTMAX.make(unidirectional=True))
    alone = [attend(*(x[:, :, h : h + 1] for x in seen[-1])) for h in range(HEADS)]
    _, put_together = host.build(lambda *_, **__: jnp.concatenate(alone, axis=-2))
    assert_close(apply(parameters, inputs()), put_together(parameters, inputs()))


def test_weights_cannot_be_sown(host):
    parameters, apply, _ = pair(host, SOFTMAX)
    with pytest.raises((ValueError, NotImplementedError), match="sow_weights"):
        apply(parameters, inputs(), sow_weights=True)


# Dropout


def dropout_outputs(host, x, count, *, broadcast):
    parameters, apply, _ = pair(host, SOFTMAX, dropout_rate=0.5, broadcast_dropout=broadcast)
    outputs = jax.jit(jax.vmap(lambda key: apply(parameters, x, dropout_key=key)))(
        jax.random.split(jax.random.key(3), count)
    )
    return outputs, apply(parameters, x)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_leaves_the_expectation(host, broadcast):
    outputs, expected = dropout_outputs(host, inputs(), 2000, broadcast=broadcast)
    error = np.std(outputs, axis=0) / np.sqrt(len(outputs))
    assert np.all(error > 0)
    assert np.max(np.abs(np.mean(outputs, axis=0) - expected) / error) < 5.5


def test_dropout_is_off_when_deterministic(host):
    parameters, without, _ = pair(host, SOFTMAX)
    _, apply, _ = pair(host, SOFTMAX, dropout_rate=0.5)
    np.testing.assert_array_equal(apply(parameters, inputs()), without(parameters, inputs()))


def test_dropout_follows_its_key(host):
    parameters, apply, _ = pair(host, SOFTMAX, dropout_rate=0.5)
    x, first, second = inputs(), jax.random.key(1), jax.random.key(2)
    out = apply(parameters, x, dropout_key=first)
    np.testing.assert_array_equal(out, apply(parameters, x, dropout_key=first))
    assert np.max(np.abs(out - apply(parameters, x, dropout_key=second))) > 1e-2


@pytest.mark.parametrize("broadcast", [True, False])
def test_broadcast_dropout_is_one_draw_for_the_batch(host, broadcast):
    x = jnp.concatenate([inputs(1, LENGTH)] * 2)
    outputs, _ = dropout_outputs(host, x, 8, broadcast=broadcast)
    same = np.all(np.isclose(outputs[:, 0], outputs[:, 1], atol=1e-6), axis=(1, 2))
    assert np.all(same) if broadcast else not np.any(same)


def test_redrawing_follows_the_dropout_key_and_stops_at_evaluation(host):
    # A rate this small makes Flax pass a key and, at this size, drops nothing.
    options = {"dropout_rate": 1e-9}
    fixed = SOFTMAX.make(projection_matrix=None, redraw_features=False, seed=5)
    redrawn = SOFTMAX.make(projection_matrix=None, redraw_features=True, seed=5)
    parameters, apply = host.build(redrawn, **options)
    _, reference = host.build(fixed, **options)
    apply, reference = jax.jit(apply), jax.jit(reference)
    x, first, second = inputs(), jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(apply(parameters, x), reference(parameters, x))
    training = apply(parameters, x, dropout_key=first)
    np.testing.assert_array_equal(training, apply(parameters, x, dropout_key=first))
    assert np.max(np.abs(training - apply(parameters, x, dropout_key=second))) > 1e-3
    assert_close(reference(parameters, x, dropout_key=first), reference(parameters, x))


# Transformations


def test_eager_and_vmap_change_nothing(host):
    parameters, compiled, _ = pair(host, SOFTMAX, unidirectional=True)
    _, apply = host.build(SOFTMAX.make(unidirectional=True))
    x, mask = inputs(), jnp.arange(LENGTH)[None, None, None] < 8
    expected = compiled(parameters, x, mask=mask)

    assert_close(apply(parameters, x, mask=mask), expected)
    assert_close(jax.vmap(lambda row: compiled(parameters, row, mask=mask[0]))(x), expected)


def test_no_tracer_leaks(host):
    parameters, apply = host.build(
        SOFTMAX.make(unidirectional=True, projection_matrix=None), dropout_rate=0.1
    )
    mask = jnp.arange(LENGTH)[None, None, None] < 8

    def loss(parameters, x, key):
        return jnp.sum(apply(parameters, x, mask=mask, dropout_key=key) ** 2)

    with checking_leaks():
        gradient = jax.jit(jax.grad(loss))(parameters, inputs(), jax.random.key(0))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    # The function is as good as new after it was traced.
    assert np.all(np.isfinite(apply(parameters, inputs(), mask=mask)))
