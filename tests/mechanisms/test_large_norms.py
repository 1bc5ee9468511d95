"""Squared norms of 1e-3 to 2000 where parameters are fitted, and where positions are divided."""

import functools

import jax
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention, on_mesh
from fast_attention.mechanisms.favor.calibration import calibrate
from fast_attention.mesh.meshes import make_mesh
from tests.mechanisms import dense

B, T, H, K, D, V = 2, 20, 2, 1, 16, 4
NORMS = [(1e-3, 1e-3), (30, 30), (200, 200), (800, 800), (2000, 2000), (3, 2000), (2000, 3)]
favor = functools.partial(make_fast_softmax_attention, D, nb_features=32, chunk_size=8)


def arrays(norm, key_norm):
    """Queries and keys with ``|q|^2 / sqrt(D) = norm``."""
    rng = np.random.default_rng(0)
    found = []
    for heads, squared in ((H, norm), (K, key_norm)):
        x = rng.normal(size=(B, T, heads, D))
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        found.append((x / length * np.sqrt(squared * D**0.5)).astype(np.float32))
    return (*found, rng.normal(size=(B, T, K, V)).astype(np.float32))


def check(run, function, causal, **options):
    seen = np.tri(T, dtype=bool) if causal else np.ones((T, T), bool)
    seen = np.broadcast_to(seen, (B, H, T, T))
    for norms in NORMS:
        query, key, value = arrays(*norms)
        fitted = {name: make(function, query, key) for name, make in options.items()}
        weights = dense.favor(function, query, key, seen, np.zeros(seen.shape), **fitted)
        found = run(query, key, value, **fitted)
        # Exponents near 1000 have a float32 spacing of 6e-5.
        np.testing.assert_allclose(found, dense.attend(weights, value), atol=5e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_calibrated_parameters(causal):
    function = favor(estimator="wderf_s", calibration="stored", unidirectional=causal)
    check(jax.jit(function), function, causal, projection=calibrate)


@pytest.mark.eight_devices
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("causal", [False, True])
def test_positions_divided_over_a_mesh(causal):
    function = favor(unidirectional=causal)
    check(jax.jit(on_mesh(function, make_mesh(sequence=8))), function, causal)
