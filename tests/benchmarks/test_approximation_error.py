"""Tuned features on trained heads: what the documentation says of them, with one draw."""

import numpy as np
import pytest

from benchmarks import approximation_error as errors

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize(("name", "gain"), [("minilm", 3.0), ("rxnfp", 1.4)])
def test_wderf_s_on_trained_heads(name, gain):
    data = errors.trained_heads(name)

    def mean(estimator, coupling="", draws=1):
        found = errors.squared_errors(estimator, coupling, data, features=256, draws=draws)
        assert found.shape == (draws, data[0].shape[1])
        return found.mean()

    tuned = mean("wderf_s", "orthogonal_antithetic")
    assert tuned * gain < mean("google", "orthogonal", draws=2)
    assert tuned < mean("uniform")


def test_held_out_calibration_keeps_most_of_it():
    sample, data = errors.halves(errors.trained_heads("minilm"))

    def mean(estimator, coupling, sample=None):
        return errors.squared_errors(
            estimator, coupling, data, features=256, draws=1, sample=sample
        ).mean()

    plain = mean("google", "orthogonal")
    own = mean("wderf_s", "orthogonal_antithetic")
    other = mean("wderf_s", "orthogonal_antithetic", sample)
    assert own < other < plain / 2


def test_the_table_has_a_line_for_every_case(monkeypatch):
    monkeypatch.setattr(errors, "CASES", (("google", "iid"), ("uniform", "")))
    monkeypatch.setattr(errors, "DATA", {"few": lambda: errors.anisotropic(1.0, 20, 4)})
    lines = list(errors.table(["few"], 8, 1, held_out=False))
    assert lines[0] == "| estimator | coupling | few |" and len(lines) == 4
    assert lines[2].startswith("| google | iid |") and "(1.0x)" in lines[2]


def test_google_formula_is_softmax_with_many_features_and_small_inputs():
    data = errors.gaussian(0.3, 30, 4)
    rows = np.random.default_rng(0).normal(size=(20000, 4)).astype(np.float32)
    np.testing.assert_allclose(errors.google(data, rows), errors.exact(data), atol=0.02)
