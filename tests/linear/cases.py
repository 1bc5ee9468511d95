"""Shapes, feature maps and inputs that the tests of linear attention share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.feature_maps import (
    HyperbolicFeatures,
    PositiveFeatures,
    TrigonometricFeatures,
    elementwise_map,
)
from fast_attention.linear import Plan, linear_attention
from tests import compiling

B, T, H, K, D, V, M = 2, 13, 4, 2, 8, 6, 16
CHUNK = 4

# What serves every call; the GPU kernels have tests of their own.
IMPLEMENTATIONS = ("chunked", "parallel_chunks", "quadratic")

MAPS = {
    "positive": PositiveFeatures(M),
    "hyperbolic": HyperbolicFeatures(M // 2),
    # Many rows and small inputs keep signed denominators away from zero.
    "trigonometric": TrigonometricFeatures(4 * M),
    "relu": elementwise_map("relu", num_rows=M),
    "elu+1": elementwise_map("elu+1", epsilon=0.0),
    "exp": elementwise_map("exp", num_rows=M),
}


ARGUMENTS = (
    *("query", "key", "value", "parameters", "key_mask", "key_bias", "segment_ids"),
    *("initial_state", "return_state", "exact_window", "log_decay"),
)


def with_plan(function):
    """Returns the function with the fields of its plan as keywords."""

    @functools.wraps(function)
    def call(*arrays, **options):
        given = {name: options.pop(name) for name in ARGUMENTS if name in options}
        return function(*arrays, plan=Plan(**options), **given)

    return call


attend = with_plan(linear_attention)


def compiled(function):
    """Jits with little optimisation: in these tests compiling costs far more than running."""
    return compiling.compiled(function, xla_backend_optimization_level=0)


@functools.cache
def numpy_parameters(name, dim=D):
    parameters = MAPS[name].init(jax.random.key(3), dim)
    return None if parameters is None else np.asarray(parameters)


def parameters_of(name, dtype=jnp.float32):
    parameters = numpy_parameters(name)
    return None if parameters is None else jnp.asarray(parameters, dtype)


def draw(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def qkv(seed=0, *, length=T, keys=None, dtype=jnp.float32, scale=0.5, batch=B):
    """Returns query, key and value of the shared shapes."""
    keys = keys or length
    return (
        jnp.asarray(draw((seed, 0), batch, length, H, D, scale=scale), dtype),
        jnp.asarray(draw((seed, 1), batch, keys, K, D, scale=scale), dtype),
        jnp.asarray(draw((seed, 2), batch, keys, K, V), dtype),
    )


def true_state(state):
    """Returns the sums a state stands for, without their scale."""
    if state.log_scale is None:
        return state.kv, state.k_sum
    factor = jnp.exp(state.log_scale)
    return state.kv * factor[..., None, :], state.k_sum * factor


def weighted_sum(tree):
    """A scalar whose cotangents differ at every entry."""
    total = 0.0
    for seed, x in enumerate(jax.tree.leaves(tree)):
        total = total + jnp.sum(x * jnp.asarray(draw((7, seed), *x.shape), x.dtype))
    return total


def gradients(smooth, fixed, **options):
    """Returns outputs, true final sums, and gradients for every float array in ``smooth``.

    ``smooth`` and ``fixed`` hold arguments of ``linear_attention``; the initial state's ``kv`` and
    ``k_sum`` are in the one, its template ``initial_state`` in the other.
    """

    def loss(smooth):
        arguments = {**fixed, **smooth}
        state = arguments.pop("initial_state", None)
        if state is not None:
            state = type(state)(arguments.pop("kv"), arguments.pop("k_sum"), state.log_scale)
        q, k, v = (arguments.pop(name) for name in ("query", "key", "value"))
        out, final = attend(q, k, v, **arguments, initial_state=state, return_state=True, **options)
        result = (out, *true_state(final))
        return weighted_sum(result), result

    grads, result = jax.grad(loss, has_aux=True)(smooth)
    return result, grads


def assert_close(actual, expected, tolerance):
    """Compares pytrees, each leaf relative to the largest expected value in it."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        error, size = np.abs(x - y).max(initial=0), np.abs(y).max(initial=0)
        assert error <= tolerance * max(size, 1e-3), f"error {error:.2e}, largest value {size:.2e}"
