"""The feed-forward part is `activation(x W_1 + b_1) W_2 + b_2`, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import ACTIVATIONS, FeedForward
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled

X = draw(2, 3, 4)


def build(**options):
    return filled(lambda: FeedForward(4, 6, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_definition(activation):
    layer = build(activation=activation)
    out = compiled(layer)(X)
    np.testing.assert_allclose(out, definitions.feed_forward(layer, X, activation), atol=1e-6)


def test_any_function_is_an_activation():
    named, given = build(activation="tanh"), build(activation=jnp.tanh)
    np.testing.assert_array_equal(compiled(named)(X), compiled(given)(X))


def test_a_gate_multiplies_the_second_half():
    layer = build(glu=True, activation="gelu_exact")
    up, down = definitions.linear(layer.up, X), definitions.linear
    hidden = definitions.ACTIVATIONS["gelu_exact"](up[..., :6]) * up[..., 6:]
    assert layer.up.kernel.shape == (4, 12) and layer.down.kernel.shape == (6, 4)
    np.testing.assert_allclose(compiled(layer)(X), down(layer.down, hidden), atol=1e-6)


@pytest.mark.parametrize(("length", "chunks"), [(7, 3), (2, 100), (6, 3)])
def test_pieces_change_no_value_and_no_gradient(length, chunks):
    whole, cut = build(glu=True), build(glu=True, chunks=chunks)
    x = draw(2, length, 4)

    def gradients(layer):
        graphdef, state = nnx.split(layer)

        def loss(state, x):
            out = nnx.merge(graphdef, state)(x)
            return jnp.sum(jnp.sin(out)), out

        (_, out), found = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(state, x)
        return jax.tree.leaves((out, found))

    for found, expected in zip(gradients(cut), gradients(whole), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(cut(x[0, 0]), whole(x[0, 0]), atol=1e-6)


def test_pieces_need_less_memory_also_for_gradients(optimized):
    def bytes_needed(chunks):
        layer = nnx.eval_shape(lambda: FeedForward(4, 64, chunks=chunks, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(layer)
        loss = lambda state, x: jnp.sum(jnp.square(nnx.merge(graphdef, state)(x)))  # noqa: E731
        x = jax.ShapeDtypeStruct((1, 256, 4), jnp.float32)
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(state, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert bytes_needed(16) < bytes_needed(1) / 4


def test_pieces_drop_independently():
    layer = build(dropout_rate=0.5, chunks=4)
    x = np.tile(X[0, 0], (8, 1))
    out = np.asarray(compiled(lambda x: layer(x, deterministic=False, rngs=nnx.Rngs(1)))(x))
    assert len(np.unique(out, axis=0)) > 4
    with pytest.raises(ValueError, match="no `rngs` argument"):
        layer(x, deterministic=False)


def test_there_is_a_piece():
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        build(chunks=0)


def test_dropout_hits_activations_and_outputs_and_leaves_the_expectation():
    layer = build(dropout_rate=0.5)
    drop = compiled(lambda x: layer(x, deterministic=False, rngs=nnx.Rngs(1)))
    samples = drop(np.tile(X[0, 0], (4000, 1)))
    expected = definitions.feed_forward(layer, X[0, 0])
    error = np.std(samples, axis=0) / np.sqrt(4000)
    assert np.all(np.abs(np.mean(samples, axis=0) - expected) < 5 * error)
    # Outputs are dropped at the rate; those that are left differ, as their activations do.
    assert np.mean(samples == 0) == pytest.approx(0.5, abs=0.02)
    assert np.all(np.std(samples, axis=0, where=samples != 0) > 0.05)


def test_dropout_is_off_when_deterministic_and_needs_a_key_otherwise():
    layer, without = build(dropout_rate=0.5), build()
    expected = without(X, deterministic=False)
    np.testing.assert_array_equal(layer(X, rngs=nnx.Rngs(1)), expected)
    with pytest.raises(ValueError, match="no `rngs` argument"):
        layer(X, deterministic=False)


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        (None, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    ],
)
def test_computes_in_its_dtype_or_in_that_of_inputs_and_parameters(dtype, given, expected):
    layer = build(dtype=dtype)
    assert jax.eval_shape(layer, jnp.asarray(X, given)).dtype == expected
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(layer)))


def test_an_unknown_activation_is_told_what_there_is():
    with pytest.raises(ValueError, match=r"one of \['celu', .*'tanh'\] or a function, got 'geluu'"):
        build(activation="geluu")
