"""The baseline of the speed claims computes the same attention, with the same gradients."""

from __future__ import annotations

import jax
import numpy as np

from benchmarks import per_token
from fast_attention.feature_maps import PositiveFeatures
from fast_attention.linear_attention import linear_attention


def test_baseline_agrees_with_linear_attention():
    feature_map = PositiveFeatures(16)
    projection = feature_map.init(jax.random.key(0), 8)
    arrays = [
        0.5 * jax.random.normal(key, (2, 9, 2, 8)) for key in jax.random.split(jax.random.key(1), 3)
    ]

    def with_gradients(function):
        def loss(*arrays):
            out = function(*arrays)
            return (out**2).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return out, *gradients

    def ours(q, k, v):
        return linear_attention(
            q, k, v, feature_map=feature_map, parameters=projection, causal=True, chunk_size=4
        )

    def theirs(q, k, v):
        return per_token.attention(q, k, v, projection)

    found, expected = with_gradients(ours), with_gradients(theirs)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
