"""Elementwise kernels: formulas, kinds, gradients at the edges."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import (
    KERNELS,
    ExponentialFeatures,
    IdentityFeatures,
    LogFeatures,
    SignedElementwiseFeatures,
    elementwise_map,
)

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "squared_relu": lambda x: max(x, 0.0) ** 2,
    "elu+1": lambda x: x + 1 if x > 0 else math.exp(x),
    "exp": math.exp,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "cos": math.cos,
    "sin": math.sin,
    "abs": abs,
    "identity": lambda x: x,
}
X = jnp.asarray([[-3.0, -0.7, 0.0, 0.4], [2.5, -1.2, 0.3, -0.1]])


def features(feature_map, x, parameters=None):
    return feature_map.apply(x, parameters, is_query=True, exact_scale=False).shift(None)


def test_every_kernel_has_its_formula():
    assert KERNELS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", KERNELS)
def test_formula_raw_and_projected(name):
    formula = np.vectorize(FORMULAS[name])
    raw = elementwise_map(name, epsilon=0.25)
    assert raw.init(jax.random.key(0), 4) is None
    assert raw.num_features(None, 4) == 4
    np.testing.assert_allclose(features(raw, X), formula(X) + 0.25, rtol=2e-6, atol=1e-6)
    projected = elementwise_map(name, epsilon=0.0, num_rows=6, normalize_data=True)
    w = projected.init(jax.random.key(0), 4)
    assert w.shape == (6, 4) and projected.num_features(w, 4) == 6
    expected = formula(np.asarray(X) * 4**-0.25 @ np.asarray(w).T)
    np.testing.assert_allclose(features(projected, X, w), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_kinds(name):
    feature_map = elementwise_map(name)
    grid = np.vectorize(FORMULAS[name])(np.linspace(-4, 4, 81))
    assert feature_map.signed == (grid.min() < 0)
    assert isinstance(feature_map, SignedElementwiseFeatures) == feature_map.signed
    assert isinstance(feature_map, ExponentialFeatures) == (name == "exp")
    result = feature_map.apply(X, None, is_query=True, exact_scale=False)
    assert (result.log is None) == (feature_map.log_kind == "none")
    assert elementwise_map(KERNELS[name]) == feature_map
    hash(feature_map)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_finite_far_out(name):
    feature_map = elementwise_map(name)

    def total(x):
        result = feature_map.apply(x, None, is_query=False, exact_scale=False)
        return sum(jnp.sum(part) for part in result if part is not None)

    assert np.isfinite(jax.grad(total)(jnp.asarray([[-1e4, -200.0, 0.0, 200.0, 1e4]]))).all()


def test_an_unknown_function_may_have_both_signs():
    feature_map = elementwise_map(lambda x: 2 * x**2, epsilon=1.0)
    assert feature_map.signed and not elementwise_map(jax.nn.softplus).signed
    np.testing.assert_allclose(features(feature_map, X), 2 * X**2 + 1, rtol=1e-6)


def test_features_given_already():
    np.testing.assert_array_equal(features(IdentityFeatures(), X), X)
    np.testing.assert_allclose(features(LogFeatures(), X), jnp.exp(X))
    assert IdentityFeatures().num_features(None, 4) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("swish",), ValueError, "Unknown kernel 'swish'"),
        ((3,), TypeError, "elementwise function"),
        (("relu", -1.0), ValueError, "at least 0, got -1"),
    ],
)
def test_refused(arguments, error, message):
    kernel, *epsilon = arguments
    with pytest.raises(error, match=message):
        elementwise_map(kernel, epsilon=epsilon[0] if epsilon else 0.0)
