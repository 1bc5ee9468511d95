"""Pictures and tables of errors, on tiny data; the tables of the guide against its numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import approximation_figure as figure
from benchmarks.approximation_error import anisotropic
from benchmarks.approximation_tables import features_for, tables
from fast_attention.diagnostics.curves import error_curves

DOCS = Path(__file__).parents[2] / "docs"


def test_one_command_makes_pictures_numbers_and_tables(monkeypatch, tmp_path, capsys):
    few = figure.Measurement(
        {"minilm": lambda: anisotropic(1.0, 20, 4)},
        {name: figure.maker("favor+", "iid") for name in ("favor+", "wderf_s, antithetic")},
        features=(2, 4),
        draws=1,
    )
    monkeypatch.setattr(figure, "MEASUREMENTS", {"minilm": few})
    figure.main(["--only", "minilm", "--folder", str(tmp_path)])
    assert (tmp_path / "approximation-minilm.png").stat().st_size > 0
    numbers = json.loads((tmp_path / "approximation.json").read_text())["minilm"]["minilm"]
    assert numbers["features"] == [2, 4] and len(numbers["errors"]["favor+"]) == 2
    figure.main(["--tables", "--folder", str(tmp_path)])
    assert "| minilm 0 |" in capsys.readouterr().out


def test_matrices_are_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(figure.DATA, "minilm", lambda: anisotropic(1.0, 12, 4))
    monkeypatch.setattr(figure, "HEAD", 0)
    figure.run(["matrices"], tmp_path)
    assert (tmp_path / "attention-matrices.png").exists()


def test_errors_on_gaussian_data_are_those_of_an_independent_implementation():
    """In float64, 10 draws: L = 1024, D = 64, M = 256, queries and keys of deviation 0.5.

    Against the error of uniform weights, 0.249 there, which depends on the values drawn.
    """
    published = {
        ("favor+", "orthogonal"): 0.448,
        ("favor+", "orthogonal_sqrt_d"): 0.305,
        ("favor++", "orthogonal"): 0.378,
        ("wderf_s", "orthogonal_antithetic"): 0.143,
    }
    functions = {str(name): figure.maker(*name) for name in published}
    data = figure.arrays(figure.gaussian(0.5))
    found = error_curves(functions, *data, features=(256,), draws=12)
    assert found.uniform_over_heads() == pytest.approx(0.249, rel=0.06)
    for name, error in published.items():
        rms = np.sqrt(np.mean(found.errors[str(name)] ** 2))
        assert rms / found.uniform_over_heads() == pytest.approx(error / 0.249, rel=0.06)


def test_features_for_an_error_lie_between_measured_ones():
    features, errors = (16, 64, 256), (0.8, 0.4, 0.1)
    assert features_for(0.9, features, errors) == "up to 16"
    assert features_for(0.2, features, errors) == "130"
    assert features_for(0.05, features, errors) == "over 256"


def test_effective_keys_are_all_for_equal_weights():
    data = np.zeros((10, 2, 4)), np.ones((7, 2, 4)), np.ones((7, 2, 4))
    np.testing.assert_allclose(figure.effective_keys(data, rows=3), 7)


def test_the_guide_has_the_tables_of_its_numbers_and_small_pictures():
    guide = (DOCS / "choosing-features.md").read_text()
    numbers = json.loads((DOCS / "images" / "approximation.json").read_text())
    missing = [line for line in tables(numbers).splitlines() if line not in guide]
    assert not missing
    for name in (*(f"approximation-{n}" for n in figure.MEASUREMENTS), "attention-matrices"):
        picture = DOCS / "images" / f"{name}.png"
        assert f"images/{name}.png" in guide
        assert picture.stat().st_size < 100_000


@pytest.mark.parametrize("name", ["paper", "minilm"])
def test_measurements_cover_what_the_pictures_promise(name):
    functions = set(figure.MEASUREMENTS[name].functions)
    assert set(figure.MEASUREMENTS[name].emphasis or ()) <= functions
    if name == "minilm":
        assert set(figure.ESTIMATORS) <= functions
