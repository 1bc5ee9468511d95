"""Small calls with calibrated features for the tests of this folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention import make_fast_softmax_attention
from fast_attention.mechanisms.favor.calibration import calibrate

B, T, H, K, D, M = 2, 12, 4, 2, 8, 16
make = functools.partial(make_fast_softmax_attention, D, nb_features=M)
tuned = functools.partial(make, estimator="wderf_s", projection="orthogonal_antithetic")


@functools.cache
def inputs(scale=1.0):
    rng = np.random.default_rng(0)
    q, k, v = (
        scale * (rng.normal(size=(B, T, n, D)) + 0.5 * rng.normal(size=D)) for n in (H, K, K)
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v / scale))


@functools.cache
def calibrated(estimator="wderf_s"):
    attention = make(unidirectional=True, estimator=estimator)
    return jax.jit(functools.partial(calibrate, attention))(*inputs()[:2])


def softmax(q, k, v):
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / D**0.5)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@functools.cache
def calibrated_pairs():
    attention = tuned(unidirectional=True)
    return jax.jit(functools.partial(calibrate, attention))(*inputs()[:2])
