"""Diagnostics against matrices written out in float64."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from fast_attention import make_fast_softmax_attention
from fast_attention.diagnostics.errors import (
    Recommendation,
    approximation_error,
    attention_matrix,
    recommend_features,
)
from fast_attention.diagnostics.plots import (
    log_ticks,
    plot_head_errors,
    plot_matrices,
    plot_recommendation,
)
from fast_attention.softmax_attention import make_softmax_attention
from tests.linear import cases

B, H, K, D, T = cases.B, cases.H, cases.K, cases.D, 9


def softmax(q, k, visible):
    k = np.repeat(np.asarray(k, float), H // K, axis=2)
    weights = np.exp(np.einsum("bthd,bshd->bhts", np.asarray(q, float), k) / np.sqrt(D))
    weights = weights * visible
    return weights / weights.sum(-1, keepdims=True)


def test_the_matrix_of_exact_attention_is_the_softmax_at_any_rows():
    q, k, _ = cases.qkv(length=70)
    causal = np.tri(70)[None, None]
    exact = softmax(q, k, causal)
    function = make_softmax_attention(unidirectional=True)
    np.testing.assert_allclose(attention_matrix(function, q, k), exact, atol=1e-6)
    some = attention_matrix(function, q, k, [3, 69])
    np.testing.assert_allclose(some, exact[:, :, [3, 69]], atol=1e-6)
    own = attention_matrix(function, q, k, [[3, 69], [5, 0]])
    np.testing.assert_allclose(own[1], exact[1][:, [5, 0]], atol=1e-6)


def test_the_matrix_gives_the_output_of_any_function():
    q, k, v = cases.qkv(length=T)
    function = make_fast_softmax_attention(nb_features=8, exact_window=2)
    matrix = np.asarray(attention_matrix(function, q, k))
    values = np.repeat(np.asarray(v), H // K, axis=2)
    out = np.einsum("bhts,bshv->bthv", matrix, values)
    np.testing.assert_allclose(out, function(q, k, v), atol=1e-5)


def test_errors_are_those_of_the_definition_and_padding_does_not_count():
    q, k, v = (np.asarray(x) for x in cases.qkv(length=T, scale=1.0))
    mask = np.arange(T)[None] < np.array([T, T - 3])[:, None]
    function = make_fast_softmax_attention(nb_features=8)
    found = approximation_error(function, q, k, v, mask)
    visible = mask[:, None, None] * np.ones((B, 1, T, T))
    exact, equal = softmax(q, k, visible), visible / visible.sum(-1, keepdims=True)
    matrix = np.asarray(attention_matrix(function, q, k, key_mask=mask))
    rows = mask[:, None, :, None]
    values = np.repeat(np.moveaxis(v, 2, 1), H // K, axis=1)

    def relative(found, exact):
        norm = lambda x: np.sqrt((x**2 * rows).sum((0, 2, 3)))  # noqa: E731
        return norm(found - exact) / norm(exact)

    np.testing.assert_allclose(found.matrix, relative(matrix, exact), rtol=1e-4)
    np.testing.assert_allclose(found.output, relative(matrix @ values, exact @ values), rtol=1e-4)
    uniform = relative(equal @ values, exact @ values)
    np.testing.assert_allclose(found.uniform, uniform, rtol=1e-4)
    entropy = -np.where(exact > 0, exact * np.log(np.where(exact > 0, exact, 1)), 0).sum(-1)
    keys = (np.exp(entropy) * mask[:, None]).sum((0, 2)) / mask.sum()
    np.testing.assert_allclose(found.effective_keys, keys, rtol=1e-5)


def test_exact_attention_has_no_error_and_uniform_rows_share_all_keys():
    q, k, v = cases.qkv(length=T)
    found = approximation_error(make_softmax_attention(), 0 * q, k, v)
    for errors in (found.output, found.uniform, found.matrix):
        assert errors.shape == (H,) and (errors < 1e-6).all()
    np.testing.assert_allclose(found.effective_keys, T, rtol=1e-5)
    causal = approximation_error(make_softmax_attention(unidirectional=True), 0 * q, k, v)
    np.testing.assert_allclose(causal.effective_keys, (T + 1) / 2, rtol=1e-5)


def test_features_are_doubled_until_the_error_is_reached_and_then_extrapolated():
    errors = {4: 0.8, 8: 0.5, 16: 0.3}
    q, k, _ = cases.qkv(length=T)
    exact = make_softmax_attention()
    asked = []

    def make(features):
        """Exact weights made too large by the error wanted."""
        asked.append(features)
        return lambda *x, **options: (1 + errors[features]) * exact(*x, **options)

    def find(target):
        asked.clear()
        return recommend_features(q, k, target, make_attention=make, smallest=4, largest=16)

    reached = find(0.6)
    assert asked == [4, 8] and reached.features == 8 and not reached.extrapolated
    np.testing.assert_allclose(reached.error, 0.5, rtol=1e-5)
    beyond = find(0.1)
    assert asked == [4, 8, 16] and beyond.features in (144, 145) and beyond.extrapolated
    assert beyond.error <= 0.1 + 1e-6
    with pytest.raises(ValueError, match="target_error=0"):
        find(0)


def test_features_are_recommended_for_what_is_no_padding():
    q, k, _ = cases.qkv(length=T)
    fast = make_fast_softmax_attention(nb_features=8)
    options = {"make_attention": lambda features: fast, "smallest": 8, "largest": 8}
    mask = np.arange(T)[None] < np.full((B, 1), T - 3)
    padded = recommend_features(q, k, 9.0, key_mask=mask, **options)
    alone = recommend_features(q[:, : T - 3], k[:, : T - 3], 9.0, **options)
    np.testing.assert_allclose(padded.error, alone.error, rtol=1e-4)


def test_pictures(tmp_path):
    plot_matrices({"exact": np.eye(3), "fast": np.ones((3, 3)) / 3}, tmp_path / "matrices.png")
    for extrapolated in (True, False):
        found = Recommendation(32, 0.2, extrapolated, ((8, 0.4), (16, 0.3)))
        plot_recommendation(found, tmp_path / f"{extrapolated}.png")
    ratios = [[0.5, np.nan], [1.2, 3.0]]
    plot_head_errors(ratios, tmp_path / "heads.png", {"exact": np.eye(3)}, "errors")
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ValueError, match="matrices"):
        plot_matrices({"cube": np.ones((2, 2, 2))}, tmp_path / "none.png")


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(18.0, 23.0, {"18", "20", "22"}), (0.2, 0.9, {"0.2", "0.4"}), (3.0, 5000.0, {"10", "1000"})],
    ids=["narrow", "below_one", "wide"],
)
def test_ticks_of_a_logarithmic_axis_are_plain_numbers(low, high, labels):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 2], [low, high])
    log_ticks(axes.yaxis)
    figure.draw_without_rendering()
    assert axes.get_yscale() == "log"
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    found = {tick.label1.get_text() for tick in ticks} - {""}
    assert labels <= found and all(float(label) > 0 for label in found)
    assert not any("e" in label for label in found)
