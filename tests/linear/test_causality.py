"""The future cannot reach the past, not even by a rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from tests.compiling import compiled
from tests.linear import cases

# Rounding and memory are those of programs as users have them.
pytestmark = pytest.mark.usefixtures("optimized")

softmax = functools.partial(
    make_fast_softmax_attention, cases.D, nb_features=cases.M, unidirectional=True
)
generalized = functools.partial(
    make_fast_generalized_attention, cases.D, nb_features=cases.M, unidirectional=True
)


@pytest.mark.parametrize(
    ("make", "dtype", "chunk", "length"),
    [
        (softmax, jnp.float32, 1, 9),
        (softmax, jnp.float32, 4, 18),
        (softmax, jnp.bfloat16, 4, 16),
        (functools.partial(softmax, renormalize_attention=False), jnp.float32, 8, 16),
        (functools.partial(softmax, nonnegative_features=False), jnp.float32, 4, 16),
        (functools.partial(generalized), jnp.float32, 16, 18),
        (functools.partial(generalized, kernel_fn="exp", features_type="iid"), jnp.bfloat16, 4, 16),
        (functools.partial(softmax, implementation="parallel_chunks"), jnp.float32, 1, 8),
        (functools.partial(softmax, implementation="parallel_chunks"), jnp.bfloat16, 4, 16),
        (functools.partial(generalized, implementation="parallel_chunks"), jnp.float32, 4, 18),
        (functools.partial(softmax, implementation="time_minor_chunks"), jnp.bfloat16, 8, 18),
        (functools.partial(generalized, implementation="time_minor_chunks"), jnp.float32, 4, 16),
        (functools.partial(softmax, implementation="pallas_tpu_interpret"), jnp.bfloat16, 8, 18),
        # The quadratic form has no chunks.
        (functools.partial(softmax, implementation="quadratic"), jnp.float32, None, 18),
        (functools.partial(softmax, implementation="quadratic"), jnp.bfloat16, None, 18),
        (functools.partial(generalized, implementation="quadratic"), jnp.float32, None, 18),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_past_is_bit_equal_under_any_future(make, dtype, chunk, length):
    attention = compiled(make(chunk_size=chunk))
    q, k, v = (np.asarray(x) for x in cases.qkv(length=length, dtype=dtype, scale=1.0))
    out = np.asarray(attention(q, k, v), np.float32)
    for t in {1, 6, 8, 13, 16, length - 1} & set(range(length)):
        later = (np.arange(length) >= t)[:, None, None]
        changed = attention(*(np.where(later, x * x.dtype.type(1e4), x) for x in (q, k, v)))
        changed = np.asarray(changed, np.float32)
        np.testing.assert_array_equal(changed[:, :t], out[:, :t])
        assert (changed[:, t:] != out[:, t:]).any()


def test_is_causal_makes_any_function_causal():
    arrays = cases.qkv(length=5)
    made = jax.make_jaxpr(functools.partial(softmax(unidirectional=False), is_causal=True))(*arrays)
    causal = jax.make_jaxpr(softmax())(*arrays)
    assert str(made) == str(causal)
    for one, other in zip(made.consts, causal.consts, strict=True):
        np.testing.assert_array_equal(one, other)
