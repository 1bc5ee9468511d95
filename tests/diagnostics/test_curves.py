"""Errors against the number of features, and their picture."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.diagnostics.curves import ErrorCurves, error_curves
from fast_attention.diagnostics.errors import approximation_error
from fast_attention.diagnostics.plots import _apart, plot_errors
from fast_attention.mechanisms.favor.calibration import calibrate
from tests.linear import cases

B, H, T = cases.B, cases.H, 9
FEATURES = (4, 8)


def plain(features):
    return make_fast_softmax_attention(nb_features=features)


def made_up(**errors):
    shape = (len(FEATURES), 3, 2)
    found = {
        name: np.broadcast_to(np.asarray(x)[:, None, None], shape) for name, x in errors.items()
    }
    return ErrorCurves(FEATURES, found, np.full(2, 0.5))


def test_errors_are_those_of_the_functions_for_every_draw_and_masked():
    q, k, v = cases.qkv(length=T)
    mask = jnp.asarray(np.arange(T)[None] < np.array([T, T - 3])[:, None])
    found = error_curves({"plain": plain}, q, k, v, mask, features=FEATURES, draws=2)
    assert found.errors["plain"].shape == (2, 2, H) and found.features == FEATURES
    assert np.unique(found.errors["plain"]).size == 4 * H
    judged = approximation_error(plain(4), q, k, v, mask)
    np.testing.assert_allclose(found.uniform, judged.uniform, rtol=1e-6)
    rms = np.sqrt((found.errors["plain"] ** 2).mean(-1))
    np.testing.assert_allclose(found.over_heads("plain"), rms)
    np.testing.assert_allclose(found.uniform_over_heads(), np.sqrt((found.uniform**2).mean()))


def test_stored_parameters_are_calibrated_on_what_is_given():
    q, k, v = cases.qkv(length=T)

    def tuned(features):
        return make_fast_softmax_attention(
            nb_features=features, estimator="centred_favor++", unidirectional=True
        )

    found = error_curves({"tuned": tuned}, q, k, v, features=(8,), draws=2, is_causal=True)
    assert np.unique(found.errors["tuned"]).size == 2 * H
    attention = tuned(8)
    rows = attention.draw_projection(jax.random.split(jax.random.key(0), 2)[0], q.shape[-1])
    parameters = calibrate(attention, q, k, projection=rows)
    bound = lambda *x, **options: attention(*x, projection=parameters, **options)  # noqa: E731
    judged = approximation_error(bound, q, k, v, is_causal=True)
    np.testing.assert_allclose(found.errors["tuned"][0, 0], judged.output, rtol=1e-5)


def test_what_cannot_be_compared_is_refused():
    q, k, v = cases.qkv(length=T)
    with pytest.raises(ValueError, match="one draw are needed"):
        error_curves({"plain": plain}, q, k, v, draws=0)
    causal = {"later": lambda m: make_fast_softmax_attention(nb_features=m, unidirectional=True)}
    with pytest.raises(ValueError, match="'later' is causal"):
        error_curves(causal, q, k, v, features=(4,), draws=1)


def test_the_picture_has_every_name_and_leaves_out_what_lies_above(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    texts = []

    def save(self, path, **options):
        del path, options
        texts.extend(t.get_text() for axes in self.axes for t in axes.texts)

    monkeypatch.setattr(Figure, "savefig", save)
    curves = made_up(good=[0.3, 0.1], bad=[90.0, 30.0], broken=[np.nan, np.inf])
    plot_errors({"one": curves, "two": curves}, tmp_path / "x.png", emphasis=["good"])
    assert texts.count("good") == 2 and texts.count("uniform weights") == 2
    assert sum("bad (30 to 90)" in text and "broken" in text for text in texts) == 2


def test_pictures_are_small_and_refuse_what_was_not_measured(tmp_path):
    path = tmp_path / "x.png"
    plot_errors(made_up(good=[0.3, 0.1], fair=[0.7, 0.3]), path)
    assert 0 < path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="typo"):
        plot_errors(made_up(good=[0.3, 0.1]), path, emphasis=["typo"])


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    known = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"fast-attention\[protein\]"):
        plot_errors(made_up(good=[0.3, 0.1]), tmp_path / "x.png")


def test_names_beside_lines_do_not_overlap():
    heights = np.array([-0.2, 0.0, 0.01, 0.5, 0.99, 1.0, 1.1])
    places = _apart(heights, 0.05)
    assert (np.diff(places) > 0.05 - 1e-9).all()
    assert places[3] == 0.5 and places.min() >= -1e-9 and places.max() <= 1 + 1e-9
