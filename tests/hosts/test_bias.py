"""`bias`, which Flax's functions take though its modules do not pass it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hosts.adapters import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LENGTH,
    SOFTMAX,
    assert_close,
    directions,
    in_turn,
)


def queries_keys_values():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (BATCH, LENGTH, HEADS, HEAD_DIM)) for key in keys]


@in_turn
@pytest.mark.parametrize("shape", [(BATCH, 1, 1, LENGTH), (1, HEADS, 1, LENGTH)], ids=str)
def test_a_bias_on_keys_is_exact(mechanism, unidirectional, shape):
    ours = mechanism.make(unidirectional=unidirectional)
    define = mechanism.definition(unidirectional=unidirectional)
    bias = 3 * jax.random.normal(jax.random.key(1), shape)
    qkv = queries_keys_values()

    def value_and_gradient(function):
        def run(bias, *qkv):
            out, pull_back = jax.vjp(lambda bias, *qkv: function(*qkv, bias), bias, *qkv)
            return out, pull_back(2 * out)

        return jax.jit(run)(bias, *qkv)

    jax.tree.map(
        lambda a, b: assert_close(a, b, 2e-4), value_and_gradient(ours), value_and_gradient(define)
    )


def test_a_bias_for_all_sequences_needs_no_more_axes():
    ours, qkv = SOFTMAX.make(), queries_keys_values()
    bias = jax.random.normal(jax.random.key(1), (LENGTH,))
    assert_close(ours(*qkv, bias), ours(*qkv, bias[None, None, None, :]))


def test_a_bias_that_is_constant_over_queries_is_one_on_keys():
    ours = SOFTMAX.make(unidirectional=True)
    bias = jax.random.normal(jax.random.key(1), (BATCH, 1, 1, LENGTH))
    everywhere = jnp.broadcast_to(bias, (BATCH, 1, LENGTH, LENGTH))
    qkv = queries_keys_values()
    assert_close(ours(*qkv, everywhere), ours(*qkv, bias))


@pytest.mark.parametrize("hidden", [-jnp.inf, float(jnp.finfo(jnp.float32).min)])
def test_a_bias_of_minus_infinity_hides_keys(hidden):
    ours = SOFTMAX.make(unidirectional=True)
    visible = (jnp.arange(LENGTH) >= 3)[None, None, None, :]
    qkv = queries_keys_values()
    out = ours(*qkv, jnp.where(visible, 0.0, hidden))
    assert np.all(np.isfinite(out))
    # Where nothing is visible, what "nothing" weighs is a matter of taste.
    assert_close(out[:, 3:], ours(*qkv, mask=visible)[:, 3:])


@directions
@pytest.mark.parametrize("shape", [(LENGTH, LENGTH), (BATCH, HEADS, LENGTH, LENGTH)], ids=str)
def test_a_general_bias_is_refused(unidirectional, shape):
    ours = SOFTMAX.make(unidirectional=unidirectional)
    bias = jax.random.normal(jax.random.key(1), shape)
    with pytest.raises(ValueError, match="bias"):
        ours(*queries_keys_values(), bias)
    with pytest.raises(ValueError, match="bias"):
        jax.jit(ours)(*queries_keys_values(), bias)


def test_a_causal_bias_for_a_bidirectional_function_is_refused():
    bias = jnp.where(np.tri(LENGTH, dtype=bool), 0.0, -1e9)[None, None]
    with pytest.raises(ValueError, match="unidirectional=True|is_causal"):
        SOFTMAX.make()(*queries_keys_values(), bias)


def test_a_bias_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="bias"):
        SOFTMAX.make()(*queries_keys_values(), jnp.ones((BATCH, 1, 1, LENGTH + 1)))
