"""Layers on a mesh with Explicit axes, as `jax.make_mesh` makes it: as on one device."""

import contextlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fast_attention import (
    layers,
    make_fast_softmax_attention,
    make_local_attention,
    make_lsh_attention,
)
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.mechanisms.favor.calibration import calibrate
from tests.layers.definitions import draw, filled

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices"),
]
B, T, M = 4, 6, 8
ATTENTION = layers.AttentionConfig(
    groups=(
        layers.HeadGroup(1, make_fast_softmax_attention(nb_features=4, unidirectional=True)),
        layers.HeadGroup(1, make_local_attention(2, unidirectional=True), rotary="halves"),
    ),
    head_dim=4,
    causal=True,
)
HASHED = layers.AttentionConfig(
    groups=(layers.HeadGroup(2, make_lsh_attention(2, 2)),), head_dim=4, shared_qk=True
)
FEED_FORWARD = layers.SublayerConfig(layers.FeedForwardConfig(8))
REVERSIBLE = layers.StackConfig(
    features=M,
    blocks=(
        (layers.SublayerConfig(HASHED, shifts=(0, 1)), FEED_FORWARD),
        (
            FEED_FORWARD,
            layers.SublayerConfig(layers.MemoryConfig(num_keys=3, top_k=2, head_dim=4)),
        ),
    ),
    reversible=True,
)
MEMORY = {"num_heads": 2, "num_keys": 3, "top_k": 2, "head_dim": 4}
LAYERS = {
    "attention": (layers.MultiHeadAttention, (M, ATTENTION)),
    "reversible stack": (layers.Stack, (REVERSIBLE,)),
    "feed-forward": (layers.FeedForward, (M, 8)),
    "memory": (layers.ProductKeyMemory, (M,), MEMORY),
    "linformer": (layers.LinformerAttention, (M, layers.LinformerConfig(2, T, 3))),
    "axes": (layers.MultiAxisAttention, (2, 4), {"features": M}),
    "image": (layers.ImageLinearAttention, (M,), {"key_dim": 4, "value_dim": 4, "num_heads": 2}),
}


def build(kind, arguments, options=None, dtype=jnp.float32):
    """Filled with random numbers, on the mesh of the context."""
    drawn = "rngs" in inspect.signature(kind.__init__).parameters

    def make():
        return kind(*arguments, **(options or {}), **({"rngs": nnx.Rngs(0)} if drawn else {}))

    graphdef, state = nnx.split(filled(make))

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return nnx.merge(graphdef, jax.tree.map(cast, state))


def mesh():
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=devices())


def rows():
    return NamedSharding(mesh(), PartitionSpec("data"))


def devices():
    return jax.devices()[:2]


def differentiated(layer, x):
    def loss(layer, x):
        out = layer(x)
        return jnp.sum(jnp.sin(out)), out

    return nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(layer, x)


def check_equal(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        atol = 2e-5 * max(1.0, np.abs(other).max(initial=0))
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name):
    # A relative change of the input by 1e-7 changes gradients of the stack by up to 2e-3.
    exact = name == "reversible stack"
    with jax.enable_x64(exact):
        dtype = jnp.float64 if exact else jnp.float32
        x = jnp.asarray(draw(B, 4, 4, M) if name == "image" else draw(B, T, M), dtype)
        expected = differentiated(build(*LAYERS[name], dtype=dtype), x)
        with jax.set_mesh(mesh()):
            layer = build(*LAYERS[name], dtype=dtype)
            found = differentiated(layer, jax.device_put(x, rows()))
    check_equal(found, expected)
    assert found[1].dtype == dtype
    assert found[1].sharding.is_equivalent_to(rows(), x.ndim)
    assert found[0][1].sharding.is_equivalent_to(rows(), x.ndim)


def test_positions():
    positions = jnp.arange(B * T).reshape(B, T) % 5
    layer = build(layers.LearnedPositions, (5, M))
    x = jnp.asarray(draw(B, T, 2, 4))
    expected = layer(positions), layers.rotate(x, positions, interleaved=True)
    with jax.set_mesh(mesh()):
        layer = build(layers.LearnedPositions, (5, M))
        positions, x = jax.device_put((positions, x), rows())
        found = layer(positions), layers.rotate(x, positions, interleaved=True)
    check_equal(found, expected)


def test_decoding_in_a_scan():
    """The state has the same type before and after each token."""
    x = jnp.asarray(draw(B, T, M))
    causal = build(*LAYERS["attention"])
    expected = jax.jit(lambda x: causal(x))(x)
    with jax.set_mesh(mesh()):
        layer = build(*LAYERS["attention"])
        state = layer.init_state(B, T)
        inputs = layers.Inputs(positions=jnp.zeros((B,), jnp.int32))

        def step(carry, x):
            state, inputs = carry
            out, state = layer.step(state, x, inputs)
            return (state, inputs._replace(positions=inputs.positions + 1)), out

        tokens = jax.device_put(
            x.swapaxes(0, 1), NamedSharding(mesh(), PartitionSpec(None, "data"))
        )
        out = jax.lax.scan(step, (state, inputs), tokens)[1]
    check_equal(out.swapaxes(0, 1), expected)


def test_what_a_call_changes_is_kept():
    """Running statistics and streams of random numbers follow, and nothing else is written to."""

    def trained(layer, x, rngs):
        return nnx.jit(lambda layer, x, rngs: layer(x, deterministic=False, rngs=rngs))(
            layer, x, rngs
        )

    options = MEMORY | {"norm": "batch", "value_dropout": 0.5}
    x = jnp.asarray(draw(B, T, M))
    results = []
    for place in (None, rows()):
        with jax.set_mesh(mesh()) if place else contextlib.nullcontext():
            layer, rngs = build(layers.ProductKeyMemory, (M,), options), nnx.Rngs(1)
            placed = x if place is None else jax.device_put(x, place)
            out = [trained(layer, placed, rngs) for _ in range(2)]
            results.append((out, nnx.state(layer)))
    check_equal(*results[::-1])
    assert np.abs(results[1][0][0] - results[1][0][1]).max() > 1e-2


def test_a_module_around_a_trace_is_read():
    with jax.set_mesh(mesh()):
        layer = build(*LAYERS["feed-forward"])
        x = jax.device_put(jnp.asarray(draw(B, T, M)), rows())
        np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), layer(x), atol=1e-6)


def test_modules_that_share_a_parameter_still_do():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = self.second = nnx.BatchStat(jnp.zeros(()))

        @modules_run_on_auto_axes
        def __call__(self, x):
            self.first[...] += 1
            self.second[...] += 1
            return x * self.first[...]

    with jax.set_mesh(mesh()):
        tied = Tied()
        np.testing.assert_allclose(tied(jax.device_put(jnp.ones((2,)), rows())), 2)
    assert tied.first is tied.second and tied.first[...] == 2


def test_calibration():
    """From samples, by a function and by a layer, and from running averages."""
    function = make_fast_softmax_attention(
        nb_features=4, estimator="wderf_s", unidirectional=True, moment_decay=0.5
    )
    config = layers.AttentionConfig((layers.HeadGroup(2, function),), head_dim=4, causal=True)

    @nnx.jit
    def trained(layer, x):
        layer(x, deterministic=False, rngs=nnx.Rngs(1))
        layers.recalibrate(layer)
        return layer(x)

    def fitted(x, heads, transform):
        """On the mesh a layer is calibrated outside of jit, as users do it."""
        layer = nnx.jit(lambda: layers.MultiHeadAttention(M, config, rngs=nnx.Rngs(0)))()
        transform(layers.calibrate)(layer, x)
        first = jax.tree.map(np.asarray, nnx.state(layer))
        by_function = jax.jit(lambda x: calibrate(function, x, x))(heads)
        return jax.tree.map(np.asarray, (by_function, first, trained(layer, x)))

    arrays = draw(B, T, M), draw(B, T, 2, 4)
    with jax.set_mesh(mesh()):
        found = fitted(*jax.device_put(arrays, rows()), lambda function: function)
    expected = fitted(*arrays, nnx.jit)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, expected)
