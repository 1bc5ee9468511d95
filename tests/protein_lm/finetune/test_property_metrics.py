import numpy as np
import pytest
from scipy import stats

from fast_attention.protein_lm.finetune.property_metrics import (
    classification_metrics,
    regression_metrics,
    spearman,
)


def test_spearman_with_ties_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 6, 30), rng.integers(0, 4, 30)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    x = rng.normal(size=20)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, np.ones(20)) == 0


def test_regression_figures():
    truth, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 6.0])
    found = regression_metrics(truth, predicted)
    assert found["rmse"] == pytest.approx(1)
    assert found["rmse_of_mean"] == pytest.approx(1.25**0.5)
    assert found["r2"] == pytest.approx(1 - 1 / 1.25)
    assert regression_metrics(truth, np.full(4, 2.5))["r2"] == 0
    assert regression_metrics(np.ones(3), np.ones(3))["r2"] == 0


def test_classification_figures():
    truth = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.eye(4)[[0, 0, 1, 1, 0, 0]] * 0.7 + 0.075
    found = classification_metrics(truth, probabilities)
    assert found["accuracy"] == 3 / 6 and found["accuracy_of_majority"] == 3 / 6
    assert found["confusion"] == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found["macro_f1"] == pytest.approx((4 / 7 + 2 / 4 + 0) / 3)
    assert found["loss"] == pytest.approx(-(3 * np.log(0.775) + 3 * np.log(0.075)) / 6)
