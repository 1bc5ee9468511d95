import numpy as np
import pytest
from scipy.special import softmax

from fast_attention.protein_lm.finetune.linear_head import (
    cross_entropy,
    fit_classification,
    fit_regression,
)


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(3, [[1.0, 10.0, 0.1, 0.0]], (60, 4))


def test_a_linear_property_is_found(vectors):
    y = vectors @ [1.0, 0.2, -3.0, 0.0] + 5
    head, penalty = fit_regression((vectors[:40], y[:40]), (vectors[40:], y[40:]))
    np.testing.assert_allclose(head(vectors)[:, 0], y, atol=2e-2)
    assert penalty == pytest.approx(1e-4)


def test_ridge_is_the_minimum_of_its_penalised_error(vectors):
    y = np.random.default_rng(1).normal(size=60)
    head, penalty = fit_regression((vectors[:40], y[:40]), (vectors[40:], y[40:]))
    x = ((vectors[:40] - head.mean) / head.scale)[:, :3]
    expected = np.linalg.solve(
        x.T @ x / 40 + penalty * np.eye(3), x.T @ (y[:40] - y[:40].mean()) / 40
    )
    np.testing.assert_allclose(head.kernel[:3, 0], expected, atol=1e-4)
    assert penalty > 0.05  # Noise is best not believed.


def test_classes_are_told_apart_and_weights_count(vectors):
    classes = np.digitize(vectors[:, 0], [2.0, 4.0])
    halves = ((vectors[:40], classes[:40]), (vectors[40:], classes[40:]))
    head, _ = fit_classification(*halves, np.ones(3))
    assert (head(vectors).argmax(-1) == classes).mean() > 0.8
    noise = np.random.default_rng(2).integers(0, 2, 60)
    halves = ((vectors[:40], noise[:40]), (vectors[40:], noise[40:]))
    plain, heavy = (
        softmax(fit_classification(*halves, np.array([1.0, w]))[0](vectors), -1).mean(0)
        for w in (1.0, 9.0)
    )
    assert heavy[1] > 0.8 > plain[1]


def test_cross_entropy_is_a_weighted_mean():
    logits = np.log([[0.5, 0.5], [0.9, 0.1]])
    expected = -(np.log(0.5) + 3 * np.log(0.1)) / 4
    assert cross_entropy(logits, np.array([0, 1]), np.array([1.0, 3.0])) == pytest.approx(expected)
