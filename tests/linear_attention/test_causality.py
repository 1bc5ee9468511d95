"""The future cannot reach the past, not even by a rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from tests.linear_attention import cases

# Rounding and memory are those of programs as users have them.
pytestmark = pytest.mark.usefixtures("optimized")

T = 18
softmax = functools.partial(
    make_fast_softmax_attention, cases.D, nb_features=cases.M, unidirectional=True
)
generalized = functools.partial(
    make_fast_generalized_attention, cases.D, nb_features=cases.M, unidirectional=True
)


@pytest.mark.parametrize(
    ("make", "dtype", "chunk"),
    [
        (softmax, jnp.float32, 1),
        (softmax, jnp.float32, 4),
        (softmax, jnp.bfloat16, 4),
        (softmax, jnp.bfloat16, 16),
        (functools.partial(softmax, renormalize_attention=False), jnp.float32, 16),
        (functools.partial(softmax, nonnegative_features=False), jnp.float32, 4),
        (functools.partial(generalized), jnp.float32, 16),
        (functools.partial(generalized, kernel_fn="exp", features_type="iid"), jnp.bfloat16, 4),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_past_is_bit_equal_under_any_future(make, dtype, chunk, implementation):
    attention = jax.jit(make(chunk_size=chunk, implementation=implementation))
    q, k, v = cases.qkv(length=T, dtype=dtype, scale=1.0)
    out = np.asarray(attention(q, k, v), np.float32)
    for t in (1, 6, 8, 13, 16, T - 1):
        changed = attention(*(x.at[:, t:].multiply(1e4) for x in (q, k, v)))
        np.testing.assert_array_equal(np.asarray(changed[:, :t], np.float32), out[:, :t])
        assert (np.asarray(changed[:, t:], np.float32) != out[:, t:]).any()


def test_is_causal_makes_any_function_causal():
    q, k, v = cases.qkv(length=5)
    bidirectional = softmax(unidirectional=False)
    np.testing.assert_array_equal(bidirectional(q, k, v, is_causal=True), softmax()(q, k, v))
