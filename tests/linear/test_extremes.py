"""Huge norms, opposed queries and keys, half precision: everything stays finite and exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import PositiveFeatures, TrigonometricFeatures
from fast_attention.linear.chunked import api as chunked
from fast_attention.linear.state import empty_state
from fast_attention.linear.types import Inputs, Plan
from tests.linear import cases

# Rounding and memory are those of programs as users have them.
pytestmark = pytest.mark.usefixtures("optimized")

B, T, K, D, M, CHUNK = 2, 24, 2, 16, 32, 8
MAP = PositiveFeatures(M)
HUGE = 200 * D**0.5  # A squared norm of 200 after scaling by D^(-1/4).


def sphere(seed, squared_norm):
    x = cases.draw(seed, B, T, K, D)
    return x * np.sqrt(squared_norm) / np.linalg.norm(x, axis=-1, keepdims=True)


def scenario(name):
    """Queries, keys and values of RANDOM norms at the edges of float32's exponent."""
    q, k = sphere(0, 4.0), sphere(1, 4.0)
    if name in ("big", "opposed", "aligned"):
        q, k = sphere(0, HUGE), sphere(1, HUGE)
    if name == "opposed":
        q = -k
    if name == "aligned":
        q = k
    first = np.arange(T)[None, :, None, None] < T // 2
    if name == "big then tiny":
        k = np.where(first, sphere(1, HUGE), sphere(2, 1e-4))
    if name == "tiny then big":
        k = np.where(first, sphere(2, 1e-4), sphere(1, HUGE))
    return q, k, cases.draw(3, B, T, K, 4)


SCENARIOS = ["normal", "big", "opposed", "aligned", "big then tiny", "tiny then big"]


@functools.cache
def projection_of(feature_map):
    return np.asarray(jax.jit(feature_map.init, static_argnums=1)(jax.random.key(0), D))


@functools.cache
def attend(implementation, causal, chunk=None):
    return cases.compiled(
        functools.partial(
            cases.attend,
            feature_map=MAP,
            causal=causal,
            chunk_size=chunk,
            implementation=implementation,
        )
    )


@pytest.mark.parametrize(
    ("implementation", "causal", "chunk"),
    [
        ("chunked", True, CHUNK),
        ("chunked", True, 1),
        ("chunked", False, CHUNK),
        ("parallel_chunks", True, CHUNK),
        ("parallel_chunks", True, 1),
        ("time_minor_chunks", True, CHUNK),
        ("time_minor_chunks", False, CHUNK),
        ("quadratic", True, None),
        ("quadratic", False, None),
    ],
)
def test_within_1e_5_of_float64(implementation, causal, chunk):
    projection = projection_of(MAP)
    for name in SCENARIOS:
        x = [part.astype(np.float32) for part in scenario(name)]
        out = attend(implementation, causal, chunk)(*x, parameters=projection)
        with jax.enable_x64(True):
            exact = [part.astype(np.float64) for part in x]
            expected = attend("quadratic", causal)(*exact, parameters=projection)
            assert expected.dtype == jnp.float64
        # Exponents near 200 have a float32 spacing of 1.5e-5.
        tolerance = 1e-5 if name in ("normal", "tiny then big") else 1e-4
        cases.assert_close(out, expected, tolerance)


@pytest.mark.parametrize("feature_map", [MAP, TrigonometricFeatures(M)], ids=["pos", "trig"])
@pytest.mark.parametrize("causal", [True, False])
def test_denominators_are_at_least_one(causal, feature_map):
    """Of positive maps where a key is visible; those of signed maps are finite."""
    projection = projection_of(feature_map)
    plan = Plan(feature_map=feature_map, causal=causal, output="parts", chunk_size=CHUNK)
    visible = np.broadcast_to(np.arange(T)[:, None] >= 3, (B, T, 1))

    @cases.compiled
    def parts_of(q, k, v):
        state = empty_state(feature_map, projection, (B,), K, D, 4)
        inputs = Inputs(q, k, v, projection, visible, None, None, state)
        return chunked.attend(plan, inputs)

    for name in SCENARIOS:
        parts, state = parts_of(*(x.astype(np.float32) for x in scenario(name)))
        assert np.isfinite(parts.numerator).all()
        assert np.isfinite(parts.denominator).all()
        if not feature_map.signed:
            unseen = 3 if causal else 0
            denominator = np.asarray(parts.denominator)
            assert not denominator[:, :unseen].any()
            assert denominator[:, unseen:].min() >= 1 - 1e-5
            assert np.asarray(state.k_sum).min() >= 1 - 1e-5


@pytest.mark.parametrize(
    ("implementation", "dtype", "causal"),
    [
        ("chunked", jnp.bfloat16, True),
        ("chunked", jnp.float16, True),
        ("chunked", jnp.float16, False),
        ("parallel_chunks", jnp.bfloat16, True),
        ("time_minor_chunks", jnp.bfloat16, True),
        ("quadratic", jnp.float16, True),
    ],
)
def test_inputs_times_100_stay_finite(implementation, dtype, causal):
    projection = projection_of(MAP)
    q, k, v = (jnp.asarray(100 * x[:, : 2 * CHUNK], dtype) for x in scenario("normal"))

    def loss(q, k, v, projection):
        out = cases.attend(
            q,
            k,
            v,
            feature_map=MAP,
            parameters=projection,
            causal=causal,
            chunk_size=CHUNK,
            implementation=implementation,
        )
        return jnp.sum(out.astype(jnp.float32) ** 2) * 1e-4, out

    grads, out = cases.compiled(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(
        q, k, v, projection
    )
    assert out.dtype == dtype
    for x in (out, *grads):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    assert (
        np.abs(np.asarray(out, np.float32)).max() <= 1.01 * np.abs(np.asarray(v, np.float32)).max()
    )
