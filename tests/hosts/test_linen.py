"""What is particular to `flax.linen`: its signature filter, its cache, its quantised einsums."""

import inspect
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hosts.adapters import (
    FEATURES,
    HEAD_DIM,
    HEADS,
    LENGTH,
    LINEN,
    SOFTMAX,
    assert_close,
    in_turn,
    inputs,
    pair,
)


def attention(attention_fn, cls=nn.MultiHeadDotProductAttention, **options):
    return cls(num_heads=HEADS, qkv_features=HEADS * HEAD_DIM, attention_fn=attention_fn, **options)


def test_every_keyword_of_the_module_gets_past_its_filter():
    passed = {
        "mask",
        "dropout_rng",
        "dropout_rate",
        "broadcast_dropout",
        "deterministic",
        "dtype",
        "precision",
        "force_fp32_for_softmax",
        "qk_attn_weights_einsum",
        "attn_weights_value_einsum",
        "module",
    }
    assert passed <= set(inspect.signature(SOFTMAX.make()).parameters)


def test_the_shorter_name_is_the_same_module():
    attention_fn, x = SOFTMAX.make(unidirectional=True), inputs()
    module = attention(attention_fn, nn.MultiHeadAttention)
    parameters, apply = LINEN.build(attention_fn)
    np.testing.assert_array_equal(module.apply(parameters, x), apply(parameters, x))


def decoded(attention_fn, parameters, x, *, compiled=True, **keywords):
    """Feeds `x` token by token through the module's own cache."""
    module = attention(attention_fn, decode=True)
    cache = module.init(jax.random.key(0), inputs())["cache"]

    def step(cache, token):
        variables = {**parameters, "cache": cache}
        out, updated = module.apply(variables, token, mutable=["cache"], **keywords)
        return updated["cache"], out

    step = jax.jit(step) if compiled else step
    outputs = []
    for t in range(x.shape[1]):
        cache, out = step(cache, x[:, t : t + 1])
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)


@in_turn
def test_decoding_equals_the_causal_forward(mechanism, unidirectional):
    # In a step the cache's mask says what is visible, so that any function decodes causally.
    parameters, apply, _ = pair(LINEN, mechanism, unidirectional=True)
    x = inputs()
    expected = apply(parameters, x)
    step = mechanism.make(unidirectional=unidirectional)
    assert_close(decoded(step, parameters, x), expected)
    assert_close(decoded(step, parameters, x[:, :3], compiled=False), expected[:, :3])


@pytest.mark.parametrize("dtype", [bool, jnp.float32], ids=["bool", "float"])
def test_decoding_with_hidden_keys(dtype):
    valid = jnp.arange(LENGTH)[None, :] >= jnp.array([[3], [0]])
    mask = valid[:, None, None, :].astype(dtype)
    parameters, apply, _ = pair(LINEN, SOFTMAX, unidirectional=True)
    x = inputs()
    expected = apply(parameters, x, mask=mask)
    assert_close(decoded(SOFTMAX.make(), parameters, x, mask=mask), expected)


def test_a_stack_under_linen_transforms():
    attention_fn = SOFTMAX.make(unidirectional=True)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + attention(attention_fn)(x), None

    stacked = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    x = inputs()
    parameters = stacked.init(jax.random.key(0), x, None)
    expected = x
    for layer in range(3):
        one = jax.tree.map(operator.itemgetter(layer), parameters)
        expected, _ = Block().apply(one, expected, None)
    out, _ = jax.jit(stacked.apply)(parameters, x, None)
    assert_close(out, expected)

    gradient = jax.grad(lambda p: jnp.sum(stacked.apply(p, x, None)[0] ** 2))(parameters)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradient))


def test_softmax_in_float32_is_what_happens_anyway():
    x = inputs().astype(jnp.bfloat16)
    options = {"dtype": jnp.bfloat16}
    parameters, apply = LINEN.build(SOFTMAX.make(), **options)
    _, forced = LINEN.build(SOFTMAX.make(), force_fp32_for_softmax=True, **options)
    np.testing.assert_array_equal(apply(parameters, x), forced(parameters, x))


@pytest.mark.parametrize("hook", ["qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"])
def test_quantised_einsums_are_refused(hook):
    # There is no array of weights for them to act on.
    options: dict[str, Any] = {hook: lambda: jnp.einsum}
    module = attention(SOFTMAX.make(), **options)
    with pytest.raises((ValueError, NotImplementedError), match=hook.removesuffix("_cls")):
        module.init(jax.random.key(0), jnp.zeros((1, 2, FEATURES)))


def test_sowing_says_what_to_do():
    parameters, apply, _ = pair(LINEN, SOFTMAX)
    with pytest.raises((ValueError, NotImplementedError), match="sow_weights"):
        apply(parameters, inputs(), sow_weights=True)
