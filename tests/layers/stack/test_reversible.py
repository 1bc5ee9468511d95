"""Laws of reversible layers: gradients of plain differentiation, at a memory flat in depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.layers import residual, reversible_residual
from tests.layers.definitions import compiled, draw
from tests.leaks import checking_leaks

WIDTH, HIDDEN = 4, 6
SHAPE = (2, 3, WIDTH)
KEYS = jax.random.split(jax.random.key(1), 2)


def mix(parameters, x, shared, saved):
    """Looks along the length and at the context."""
    scores = x @ parameters["w"] @ jnp.swapaxes(shared["context"], -1, -2)
    scores = jnp.where(shared["mask"][:, None], scores, -1e9)
    return jax.nn.softmax(scores) @ shared["context"], None


def drop(parameters, x, shared, saved):
    """Feed-forward with dropout from its own key."""
    hidden = jnp.tanh(x @ parameters["up"]) @ parameters["down"]
    keep = jax.random.bernoulli(parameters["key"], 0.7, hidden.shape)
    return jnp.where(keep, hidden, 0), ()


def choose(parameters, x, shared, saved):
    """Multiplies by another row for every sign, as hash buckets would."""
    chosen = jnp.asarray(x[..., 0] > 0, jnp.int32) if saved is None else saved
    return x * parameters[chosen], chosen


FUNCTIONS = (mix, drop, choose, drop)


def example(dtype):
    feed_forward = {"up": draw(WIDTH, HIDDEN, seed=1), "down": draw(HIDDEN, WIDTH, seed=2)}
    weights = {"w": draw(WIDTH, WIDTH)}, feed_forward, draw(2, WIDTH, seed=5)
    context = draw(2, 5, WIDTH, seed=6)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (weights, context, draw(*SHAPE, seed=7)))


DIFFERENTIATED = []


@jax.custom_vjp
def encode(x):
    """An encoder that counts how often it is differentiated."""
    return 2 * x


def pull(_, gradient):
    DIFFERENTIATED.append(gradient.dtype)
    return (2 * gradient,)


encode.defvjp(lambda x: (2 * x, None), pull)


def loss(engine, weights, context, x):
    context = encode(context)
    mixing, first, rows = weights
    parameters = (
        mixing,
        {**first, "key": KEYS[0]},
        rows,
        {**first, "key": KEYS[1]},
    )
    shared = {
        "context": context,
        "mask": jnp.arange(5)[None] < jnp.array([[5], [3]]),
        "nothing": None,
    }
    y1, y2 = engine(FUNCTIONS, parameters, x, 0.5 * x, shared)
    return jnp.sum(jnp.sin(y1) * y2.astype(jnp.float32)), (y1, y2)


def gradients(engine, arguments, transform=lambda f: f):
    both = jax.value_and_grad(transform(lambda *a: loss(engine, *a)), (0, 1, 2), has_aux=True)
    return compiled(both)(*arguments)


def differences(found, expected):
    def relative(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        return np.max(np.abs(a - b)) / np.max(np.abs(b))

    return max(jax.tree.leaves(jax.tree.map(relative, found, expected)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_values_and_gradients_are_those_of_plain_differentiation(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        arguments = example(dtype)
        DIFFERENTIATED.clear()
        (value, streams), found = gradients(reversible_residual, arguments)
        assert len(DIFFERENTIATED) == 1  # The encoder, for four layers.
        (_, plain), expected = gradients(residual, arguments)
        assert streams[0].dtype == value.dtype == dtype
        jax.tree.map(np.testing.assert_array_equal, streams, plain)
        assert differences(found, expected) < tolerance


def test_half_precision_streams_are_recovered():
    arguments = example("bfloat16")
    (_, streams), found = gradients(reversible_residual, arguments)
    (_, plain), expected = gradients(residual, arguments)
    jax.tree.map(np.testing.assert_array_equal, streams, plain)
    assert {x.dtype for x in jax.tree.leaves((streams, found))} == {jnp.dtype(jnp.bfloat16)}
    assert differences(found, expected) < 2**-6


def test_holds_under_remat_vmap_and_leak_checks():
    layers = (drop, feed_forward)
    own = draw(WIDTH, HIDDEN), draw(HIDDEN, WIDTH, seed=1)
    parameters = {"up": own[0], "down": own[1], "key": KEYS[0]}, own
    x, shared = draw(2, *SHAPE), draw(*SHAPE[:-1], HIDDEN, seed=2)

    def total(engine, parameters, x):
        y1, y2 = jax.checkpoint(lambda *a: engine(layers, *a))(parameters, x, x, shared)
        return jnp.sum(y1 * y2)

    def mapped(engine):
        single = jax.grad(lambda *a: total(engine, *a), (0, 1), allow_int=True)
        d_own, d_x = jax.vmap(single, (None, 0))(parameters, x)
        return d_own[1], d_own[0]["up"], d_x

    with checking_leaks():
        found = compiled(lambda: mapped(reversible_residual))()
    assert differences(found, compiled(lambda: mapped(residual))()) < 1e-4


def test_a_choice_is_replayed_where_recovered_inputs_would_choose_otherwise():
    seen = []

    def forgetful(parameters, x, shared, saved):
        seen.append(saved)
        # What a rounding error may do to a choice, made certain: with no memory it is another.
        chosen = jnp.zeros(x.shape, jnp.int32) if saved is None else saved
        return parameters[chosen] * x, chosen

    rows, x = jnp.array([2.0, 3.0]), jnp.ones(3)

    def total(engine, rows):
        return jnp.sum(engine((forgetful,), (rows,), x, x)[0])

    found = jax.grad(lambda r: total(reversible_residual, r))(rows)
    np.testing.assert_array_equal(found, [3.0, 0.0])
    assert seen[0] is None and seen[1] is not None
    np.testing.assert_array_equal(found, jax.grad(lambda r: total(residual, r))(rows))


@pytest.mark.parametrize("engine", [residual, reversible_residual])
def test_what_functions_save_is_returned_without_gradient(engine):
    def measured(parameters, x, shared, saved):
        return jnp.sin(x), {"mean": jnp.mean(x), "count": x.size}

    def total(x):
        y1, y2, saved = engine((measured, measured), (None, None), x, x, return_saved=True)
        return jnp.sum(y1) + saved[0]["mean"] + saved[1]["mean"], (y1, saved)

    x = jnp.arange(3.0)
    gradient, (y1, saved) = compiled(jax.grad(total, has_aux=True))(x)
    np.testing.assert_allclose([s["mean"] for s in saved], [x.mean(), y1.mean()], rtol=1e-6)
    np.testing.assert_allclose(gradient, 1 + jnp.cos(x), rtol=1e-6)
    assert saved[0]["count"] == 3


def feed_forward(parameters, x, shared, saved):
    # A projection of what is shared tempts XLA to keep it from the forward pass.
    return jax.nn.gelu(x @ parameters[0]) @ parameters[1] + shared @ parameters[1], None


def test_memory_is_flat_in_depth(optimized):
    def bytes_needed(depth, tied=False):
        own = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 32), (32, 8))]
        x, shared = (jax.ShapeDtypeStruct((2, 64, w), jnp.float32) for w in (8, 32))
        parameters = (own,) * (1 if tied else 2 * depth)

        def total(parameters, x, shared):
            parameters = parameters * (2 * depth) if tied else parameters
            functions = (feed_forward,) * (2 * depth)
            y1, _ = reversible_residual(functions, parameters, x, x, shared)
            return jnp.sum(jnp.square(y1))

        lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(parameters, x, shared)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    shallow = bytes_needed(2)
    assert bytes_needed(6) < 1.1 * shallow
    assert bytes_needed(6, tied=True) < 1.1 * shallow


def test_mismatches_are_told():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="got 1 functions and 0 pytrees"):
        reversible_residual((drop,), (), x, x)
    with pytest.raises(
        ValueError, match=r"the same shape and dtype, got float32\[2, 3\] and float16"
    ):
        residual((drop,), (None,), x, x.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"got \(2, 3\) and returned an increment of \(2,\)"):
        reversible_residual((lambda p, x, s, m: (x[:, 0], None),), (None,), x, x)
