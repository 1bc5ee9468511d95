"""A stack adds to the stream what its sublayers make of it, in one stream or in two."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import (
    AttentionConfig,
    FeedForwardConfig,
    HeadGroup,
    Inputs,
    MemoryConfig,
    NormConfig,
    Stack,
    StackConfig,
    SublayerConfig,
)
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled

B, T, M = 2, 5, 6
X = draw(B, T, M)


def block(
    *, causal=False, rotary=False, shifts=None, activation="gelu", rates=(0.0, 0.0, 0.0), **options
):
    of_weights, of_attention, of_feed_forward = rates
    group = HeadGroup(2, rotary="halves" if rotary else None, dropout_rate=of_weights)
    attention = AttentionConfig(
        (group,), 4, num_kv_heads=1, causal=causal, dropout_rate=of_attention, **options
    )
    feed_forward = FeedForwardConfig(10, activation, dropout_rate=of_feed_forward)
    return SublayerConfig(attention, shifts), SublayerConfig(feed_forward, shifts)


def build(depth=1, *, dtype=None, stack: Any = None, **options: Any):
    config = StackConfig(M, (block(**options),) * depth, **(stack or {}))
    return filled(lambda: Stack(config, dtype=dtype, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_definition(causal):
    options = {"causal": causal, "rotary": causal, "activation": "silu"}
    layer = build(shifts=(0, 1) if causal else None, **options)
    options |= {"shift_tokens": causal}
    expected = [definitions.block(layer.blocks[0], row, 2, **options) for row in X]
    np.testing.assert_allclose(compiled(layer)(X), expected, atol=3e-6)


def test_dropout_hits_what_attention_adds_and_not_the_residual_stream():
    layer = build(rates=(0.0, 0.5, 0.0))
    feed_forward = layer.blocks[0][1].inner
    for part in (feed_forward.down.kernel, feed_forward.down.bias):
        part[...] = jnp.zeros_like(part[...])  # Nothing is added after attention.

    @compiled
    def dropped(seed):
        return layer(X, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.key(seed)))

    added, whole = dropped(0) - X, compiled(layer)(X) - X
    kept = np.abs(added) > 1e-6
    assert 0.25 < kept.mean() < 0.75
    np.testing.assert_allclose(added, np.where(kept, 2 * whole, 0), atol=1e-6)
    np.testing.assert_array_equal(dropped(0) - X, added)
    assert np.any((np.abs(dropped(1) - X) > 1e-6) != kept)


def test_dropout_of_weights_needs_a_key():
    layer = build(rates=(0.5, 0.0, 0.0))
    with pytest.raises(ValueError, match="dropout_rate=0.5 needs rngs"):
        jax.eval_shape(lambda: layer(X, deterministic=False))


def test_computes_in_its_dtype_and_its_state_keeps_its_types():
    layer = build(causal=True, shifts=(0, 1), dtype=jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16)
    assert jax.eval_shape(layer, x).dtype == jnp.bfloat16
    state = jax.eval_shape(lambda: layer.init_state(B, T))
    for read, new in ((layer.prefill, x), (layer.step, x[:, 0])):
        out, after = jax.eval_shape(read, state, new)
        assert out.dtype == jnp.bfloat16
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(layer)))


def gradient(layer, x, **inputs):
    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x, **inputs)))

    return compiled(nnx.grad(loss, argnums=(0, 1)))(layer, x)


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_recomputed_layers_have_the_values_and_gradients_of_plain_ones(reversible, tied):
    """In float64: with two streams, float32 rounding changes gradients by 1e-5."""
    two = {"reversible": reversible, "tie_blocks": tied, "merge": "sum"}
    long = two | ({"reverse_threshold": T} if reversible else {})
    with jax.enable_x64():
        x = jnp.asarray(X, jnp.float64)
        plain = in_float64(build(2, rates=(0.3, 0.3, 0.3), stack=long))
        again = in_float64(build(2, rates=(0.3, 0.3, 0.3), stack=two | {"remat": not reversible}))
        outputs = compiled(again)(x)
        assert outputs.dtype == jnp.float64
        np.testing.assert_allclose(outputs, compiled(plain)(x), atol=1e-12)
        for a, b in zip(
            jax.tree.leaves(gradient(again, x)), jax.tree.leaves(gradient(plain, x)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max() + 1e-12)


def in_float64(layer):
    def cast(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, jax.tree.map(cast, state))


def test_dropout_is_the_same_when_it_is_computed_again():
    layer = build(2, rates=(0.0, 0.5, 0.5), stack={"reversible": True, "layer_dropout_rate": 0.5})

    def out(x, direction):
        def call(x):
            rngs = nnx.Rngs(dropout=jax.random.key(3))
            return layer(x, deterministic=False, rngs=rngs).sum()

        return jax.grad(call)(x), jnp.vdot(jax.grad(call)(x), direction), call

    direction = draw(B, T, M, seed=5)
    with jax.enable_x64():
        x, v = jnp.asarray(X, jnp.float64), jnp.asarray(direction, jnp.float64)
        _, slope, call = out(x, v)
        step = 1e-5
        expected = (call(x + step * v) - call(x - step * v)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_a_reversible_stack_decodes_as_the_whole():
    layer = build(2, causal=True, rotary=True, shifts=(1, 0), stack={"reversible": True})
    places = jnp.broadcast_to(jnp.arange(T)[None], (B, T))

    @compiled
    def both(x):
        state = layer.init_state(B, T)
        first, state = layer.prefill(state, x[:, :3], Inputs(positions=places[:, :3]))
        rest = []
        for t in range(3, T):
            out, state = layer.step(state, x[:, t], Inputs(positions=places[:, t]))
            rest.append(out[:, None])
        return jnp.concatenate([first, *rest], axis=1), layer(x)

    np.testing.assert_allclose(*both(X), atol=3e-6)


def test_a_context_reaches_cross_attention_and_padding_of_it_does_not():
    cross = AttentionConfig((HeadGroup(2),), 4, context="cross", context_features=3)
    config = StackConfig(M, (block(causal=True), (SublayerConfig(cross), block()[1])))
    layer = filled(lambda: Stack(config, rngs=nnx.Rngs(0)))
    context, mask = draw(B, 4, 3, seed=2), np.array([[True] * 4, [True, False, True, False]])
    call = compiled(lambda x, c, m: layer(x, context=c, context_mask=m))
    masked = call(X, context, mask)
    np.testing.assert_array_equal(masked, call(X, np.where(mask[..., None], context, 9), mask))
    short = call(X[1:], context[1:, ::2], np.ones((1, 2), bool))
    np.testing.assert_allclose(masked[1:], short, atol=5e-6)
    with pytest.raises(ValueError, match="needs context="):
        layer(X)
    with pytest.raises(ValueError, match="no block attends to one"):
        build()(X, context=context)

    state = layer.init_state(B, T, Inputs(context=context, context_mask=mask))
    np.testing.assert_allclose(layer.prefill(state, X)[0], masked, atol=2e-6)
    np.testing.assert_allclose(layer.step(state, X[:, 0])[0], masked[:, 0], atol=2e-6)


def test_statistics_of_memory_move_in_training_only_also_in_reversible_stacks():
    memory = SublayerConfig(MemoryConfig(num_keys=3, num_heads=2, top_k=2, head_dim=4))
    for reversible in (False, True):
        config = StackConfig(M, ((block()[0], memory),), reversible=reversible)
        layer = filled(lambda: Stack(config, rngs=nnx.Rngs(0)))  # noqa: B023
        before = jax.tree.leaves(nnx.state(layer, nnx.BatchStat))
        nnx.jit(lambda layer: layer(X))(layer)
        for a, b in zip(before, jax.tree.leaves(nnx.state(layer, nnx.BatchStat)), strict=True):
            np.testing.assert_array_equal(a, b)
        nnx.jit(lambda layer: layer(X, deterministic=False))(layer)
        for a, b in zip(before, jax.tree.leaves(nnx.state(layer, nnx.BatchStat)), strict=True):
            assert np.all(a != b)


@pytest.mark.parametrize("kind", ["layer", "scale", "rms", "rezero", "none"])
def test_every_norm_makes_a_stack(kind):
    layer = build(2, stack={"norm": NormConfig(kind, gain=0.5)})
    scaled = [sublayer.gain is not None for part in layer.blocks for sublayer in part]
    assert all(scaled) if kind == "rezero" else not any(scaled)
    assert np.all(np.isfinite(compiled(layer)(X)))


def test_shapes_that_make_no_stack_are_errors():
    with pytest.raises(ValueError, match="cannot look ahead"):
        block(causal=True, shifts=(-1, 0))
    with pytest.raises(ValueError, match="two sublayers in every block"):
        StackConfig(M, (block()[:1],), reversible=True)
    with pytest.raises(ValueError, match="needs features and blocks"):
        StackConfig(M, ())


@pytest.mark.parametrize("options", [{"remat": True}, {"reversible": True, "merge": "sum"}])
def test_hidden_states_are_those_of_shorter_stacks(options):
    """Of what comes out after i blocks, the last is the output, and 0 the input."""
    layer = build(2, stack=options)
    found = jax.jit(lambda x: layer.hidden_states(x))(X)
    shorter = build(2, stack=options)
    shorter.blocks = nnx.List(list(layer.blocks)[:1])
    assert len(found) == 3
    np.testing.assert_array_equal(found[0], X)
    np.testing.assert_allclose(found[1], jax.jit(lambda x: shorter(x))(X), atol=1e-6)
    np.testing.assert_allclose(found[2], jax.jit(lambda x: layer(x))(X), atol=1e-6)


AFTER = NormConfig("layer", 1e-5, after=True)


def test_norms_after_the_sum():
    """The stream itself is normalised, and each sublayer reads it as it is."""
    layer = build(2, causal=True, stack={"norm": AFTER})
    expected = X
    for parts in layer.blocks:
        for part in parts:
            added = part.inner.add(jnp.asarray(expected), Inputs())[0]
            expected = part.norm(expected + added)
    np.testing.assert_allclose(compiled(layer)(X), expected, atol=1e-5)
    remat = build(2, causal=True, stack={"norm": AFTER, "remat": True})
    np.testing.assert_allclose(compiled(remat)(X), expected, atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(gradient(layer, X)), jax.tree.leaves(gradient(remat, X)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    state = layer.init_state(B, T)
    first, state = layer.prefill(state, X[:, :3])
    second, state = layer.step(state, X[:, 3])
    np.testing.assert_allclose(jnp.concatenate([first, second[:, None]], 1), expected[:, :4], 1e-4)


def test_norms_after_the_sum_need_a_norm_and_one_stream():
    with pytest.raises(ValueError, match="are not reversible"):
        build(2, stack={"norm": AFTER, "reversible": True})
    with pytest.raises(ValueError, match="needs a norm, got kind='rezero'"):
        NormConfig("rezero", after=True)
