"""Forward mode through every attention function: right, or the error names what has it.

The judge is finite differences in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import (
    make_efficient_attention,
    make_fast_generalized_attention,
    make_fast_softmax_attention,
    make_local_attention,
    make_lsh_attention,
    make_softmax_attention,
    make_strided_attention,
)
from fast_attention.linear import linear_attention
from fast_attention.linear.types import Plan
from tests.linear import cases

B, T, H, D = 2, 11, 2, 4

softmax = functools.partial(make_fast_softmax_attention, D, nb_features=8, chunk_size=3)
near_field = functools.partial(softmax, exact_window=2)
generalized = functools.partial(make_fast_generalized_attention, D, chunk_size=3)

# Functions with a gradient of their own, and with what to make them.
OWN_GRADIENT = {
    "favor+": softmax,
    "wderf_s": functools.partial(softmax, estimator="wderf_s"),
    "near field": near_field,
    "generalized": generalized,
    "lsh": functools.partial(make_lsh_attention, 2, 2),
    "efficient": make_efficient_attention,
    "strided": lambda **options: make_strided_attention(softmax(**options), 2),
}
PLAIN = {
    "exact": make_softmax_attention,
    "local": functools.partial(make_local_attention, 2),
    "blindspot": functools.partial(make_efficient_attention, blindspot_size=2),
}
MASK = jnp.arange(T)[None] < jnp.array([[T], [7]])
IDS = jnp.repeat(jnp.array([0, 1]), jnp.array([5, T - 5]), total_repeat_length=T)[None]

both_ways = pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])


def draw():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, H, D))) for _ in range(3)]


def attended(function, **options):
    """The function of a query and a value, and their directions."""
    query, key, value = draw()
    key = None if function.takes.shared_qk else key

    def attend(query, value):
        return function(query, query if key is None else key, value, **options)

    return attend, (query, value), (jnp.cos(query), jnp.sin(value))


def check_forward_mode(attend, at, direction, tolerance=1e-7):
    """``jax.jvp`` along a line, against differences."""
    run = cases.compiled(lambda *at: jax.jvp(attend, at, direction))

    def moved(step):
        return run(*(x + step * d for x, d in zip(at, direction, strict=True)))[0]

    _, tangent = run(*at)
    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose(tangent, expected, atol=tolerance * np.abs(expected).max())


@both_ways
@pytest.mark.parametrize("name", [*OWN_GRADIENT, *PLAIN])
def test_against_finite_differences(name, causal):
    if name == "blindspot" and not causal:
        pytest.skip("causal alone")
    if name == "near field" and not causal:
        pytest.skip("it is two causal passes, which take long to compile")
    # Parameters fitted to a call are constants for derivatives, which differences do not know.
    fitted = name == "wderf_s" and not causal
    make = OWN_GRADIENT.get(name) or PLAIN[name]
    options = {"implementation": "reference"} if name in OWN_GRADIENT else {}
    with jax.enable_x64(True):
        function = make(unidirectional=causal, **options)
        given = {"key_mask": MASK}
        if causal and name in ("favor+", "near field"):
            given["segment_ids"] = IDS
        if fitted:
            given["projection"] = function.draw_projection(jax.random.key(0), D)
            given["projection"] = jax.tree.map(jnp.asarray, function.resolve_parameters(None, D))
        check_forward_mode(*attended(function, **given))


@both_ways
@pytest.mark.parametrize(("name", "scale"), [("positive", 8.0), ("elu+1", 0.5)])
def test_linear_attention(name, causal, scale):
    """With a mask, a state before and after, and norms that vary much."""
    with jax.enable_x64(True):
        at = cases.qkv(length=11, dtype=jnp.float64, scale=scale)
        parameters = cases.parameters_of(name, jnp.float64)
        plan = Plan(cases.MAPS[name], causal=causal, chunk_size=4, implementation="reference")

        def attend(*arrays):
            call = functools.partial(
                linear_attention,
                *arrays,
                plan=plan,
                parameters=parameters,
                key_mask=MASK,
            )
            out, state = call(return_state=True)
            return jnp.concatenate([out, call(initial_state=state)], axis=1)

        check_forward_mode(attend, at, tuple(map(jnp.cos, at)), 1e-6)


def test_linearize():
    attend, at, direction = attended(softmax(implementation="reference"))
    _, linear = jax.jit(functools.partial(jax.linearize, attend))(*at)
    tangent = jax.jit(lambda at: jax.jvp(attend, at, direction)[1])(at)
    np.testing.assert_allclose(linear(*direction), tangent, atol=1e-5)


@both_ways
@pytest.mark.parametrize("name", OWN_GRADIENT)
def test_error_names_what_has_it(name, causal):
    if name == "efficient" and not causal:
        pytest.skip("it has no gradient of its own")
    attend, at, direction = attended(OWN_GRADIENT[name](unidirectional=causal))
    with pytest.raises(TypeError, match="implementation='reference'"):
        jax.jvp(attend, at, direction)


def test_error_of_linear_attention():
    query, key, value = cases.qkv()
    plan = Plan(cases.MAPS["positive"], causal=True)
    attend = functools.partial(
        linear_attention, plan=plan, parameters=cases.parameters_of("positive")
    )
    with pytest.raises(TypeError, match="implementation='reference'"):
        jax.jvp(attend, (query, key, value), (query, key, value))


def test_memory_is_linear():
    """Of forward mode: four times the length takes about four times the memory."""

    def needed(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        function = make_fast_softmax_attention(
            16, nb_features=64, unidirectional=True, chunk_size=64, implementation="reference"
        )
        program = jax.jit(lambda x, dx: jax.jvp(lambda x: function(x, x, x), (x,), (dx,)))
        return program.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert needed(8192) < 5 * needed(2048)
