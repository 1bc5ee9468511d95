"""What is particular to `flax.nnx.MultiHeadAttention`: grouped heads, `is_causal`, its cache."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.hosts.adapters import (
    BATCH,
    FEATURES,
    HEAD_DIM,
    HEADS,
    LENGTH,
    NNX,
    SOFTMAX,
    assert_close,
    in_turn,
    inputs,
    mechanisms,
    pair,
)


@pytest.mark.parametrize(("unidirectional", "num_kv_heads"), [(False, 1), (True, 2)])
def test_grouped_queries(unidirectional, num_kv_heads):
    options = {"unidirectional": unidirectional, "num_kv_heads": num_kv_heads}
    parameters, apply, define = pair(NNX, SOFTMAX, **options)
    x, target = inputs(), inputs(seed=2)
    mask = (jnp.arange(LENGTH) < 8)[None, None, None, :]
    assert_close(apply(parameters, x, mask=mask), define(parameters, x, mask=mask))

    def gradient(function):
        def loss(parameters):
            return jnp.mean((function(parameters, x, mask=mask) - target) ** 2)

        return jax.jit(jax.grad(loss))(parameters)

    jax.tree.map(assert_close, gradient(apply), gradient(define))


@mechanisms
def test_is_causal_makes_any_function_causal(mechanism):
    parameters, apply, _ = pair(NNX, mechanism)
    _, _, define = pair(NNX, mechanism, unidirectional=True)
    x = inputs()
    mask = nnx.make_causal_mask(jnp.ones((BATCH, LENGTH)))
    assert_close(apply(parameters, x, is_causal=True), define(parameters, x))
    assert_close(apply(parameters, x, is_causal=True, mask=mask), define(parameters, x))


def decoded(attention_fn, x, *, num_kv_heads=HEADS, compiled=True, **keywords):
    """Feeds `x` token by token through the module's own cache."""
    module = nnx.MultiHeadAttention(
        num_heads=HEADS,
        in_features=FEATURES,
        qkv_features=HEADS * HEAD_DIM,
        num_kv_heads=num_kv_heads,
        attention_fn=attention_fn,
        decode=True,
        rngs=nnx.Rngs(0),
    )
    module.init_cache(x.shape)

    def step(module, token):
        return module(token, **keywords)

    step = nnx.jit(step) if compiled else step
    return jnp.concatenate([step(module, x[:, t : t + 1]) for t in range(x.shape[1])], axis=1)


@in_turn
def test_decoding_equals_the_causal_forward(mechanism, unidirectional):
    # In a step the cache's mask says what is visible, so that any function decodes causally.
    x = inputs()
    parameters, apply, _ = pair(NNX, mechanism, unidirectional=True)
    expected = apply(parameters, x)
    step = mechanism.make(unidirectional=unidirectional)
    assert_close(decoded(step, x), expected)
    assert_close(decoded(step, x[:, :3], compiled=False), expected[:, :3])


def test_decoding_with_grouped_queries():
    x = inputs()
    parameters, apply, _ = pair(NNX, SOFTMAX, unidirectional=True, num_kv_heads=2)
    step = SOFTMAX.make(unidirectional=True)
    assert_close(decoded(step, x, num_kv_heads=2), apply(parameters, x))


@pytest.mark.parametrize(("dtype", "is_causal"), [(bool, True), (jnp.float32, False)])
def test_decoding_with_hidden_keys_and_is_causal(dtype, is_causal):
    valid = jnp.arange(LENGTH)[None, :] >= jnp.array([[3], [0]])
    mask = valid[:, None, None, :].astype(dtype)
    parameters, apply, _ = pair(NNX, SOFTMAX, unidirectional=True)
    x = inputs()
    expected = apply(parameters, x, mask=mask)
    assert_close(decoded(SOFTMAX.make(), x, mask=mask, is_causal=is_causal), expected)


def test_decoding_a_cache_of_one_position():
    parameters, apply, _ = pair(NNX, SOFTMAX, unidirectional=True)
    x = inputs(BATCH, 1)
    assert_close(decoded(SOFTMAX.make(), x), apply(parameters, x))


def test_a_stack_under_nnx_transforms():
    attention_fn = SOFTMAX.make(unidirectional=True)

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(
                HEADS, FEATURES, HEADS * HEAD_DIM, attention_fn=attention_fn, rngs=rngs
            )

        def __call__(self, x):
            return x + self.attention(x, decode=False)

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return Block(nnx.Rngs(key))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(block, x):
        return nnx.remat(lambda block, x: block(x))(block, x)

    stack, x = make(jax.random.split(jax.random.key(0), 3)), inputs()
    graph, state = nnx.split(stack)
    expected = x
    for layer in range(3):
        expected = nnx.merge(graph, jax.tree.map(operator.itemgetter(layer), state))(expected)
    assert_close(nnx.jit(scanned)(stack, x), expected)

    gradient = nnx.jit(nnx.grad(lambda stack, x: jnp.sum(scanned(stack, x) ** 2)))(stack, x)
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(gradient))


def test_sowing_says_what_to_do():
    parameters, apply, _ = pair(NNX, SOFTMAX)
    with pytest.raises((ValueError, NotImplementedError), match="sow_weights"):
        apply(parameters, inputs(), sow_weights=True)


def test_positions_for_rotation_are_refused():
    # Newer versions of the module pass them on to functions that rotate queries and keys.
    qkv = jnp.ones((3, BATCH, LENGTH, HEADS, HEAD_DIM))
    with pytest.raises(ValueError, match="input_positions"):
        SOFTMAX.make()(*qkv, input_positions=jnp.arange(LENGTH))
