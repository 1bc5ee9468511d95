"""What pictures say in words: whose they are, units, and plain ticks."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.inference import heatmap
from fast_attention.protein_lm.inference.mutations import all_substitutions
from fast_attention.protein_lm.training.plots import plot_learning_curve

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def drawn(monkeypatch):
    """Takes the figures that are saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def draw(path, length, places=None, **options):
    protein = FastaRecord("sp|P1|A_$x$", "", (LETTERS * (1 + length // 20))[:length])
    variants = all_substitutions(protein.sequence, places)
    values = np.linspace(-1, 1, len(variants))
    matrix = heatmap.effect_matrix(protein.sequence, variants, values)
    heatmap.plot_heatmap(path, protein, matrix, "log_likelihood_ratio", **options)


def frames(figure):
    """First and last position within the frame of each row."""
    bars = [axes for axes in figure.axes if axes.get_ylabel() == "residue"]
    return [tuple(axes.spines["top"].get_bounds()) for axes in bars]


def test_a_heat_map_is_as_long_as_its_protein(tmp_path, drawn):
    draw(tmp_path / "a.png", 130)
    assert frames(drawn[0]) == [(0.5, 100.5), (100.5, 130.5)]
    draw(tmp_path / "b.png", 50, [1, 2])
    assert frames(drawn[1]) == [(0.5, 50.5)]
    draw(tmp_path / "c.png", 50, range(9, 30), span=(9, 30))
    assert frames(drawn[2]) == [(9.5, 30.5)]


def test_a_heat_map_names_protein_and_unit(tmp_path, drawn):
    draw(tmp_path / "a.png", 130)
    (figure,) = drawn
    assert figure.get_suptitle() == r"sp|P1|A_\$x\$, 130 residues"
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert any(label.startswith("log likelihood ratio (nats)") for label in labels)
    for axes in figure.axes:
        if axes.get_ylabel() == "residue":
            assert all(tick == int(tick) for tick in axes.get_xticks())


def test_a_long_protein_has_a_picture_of_bounded_size(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(heatmap, "_MOST_ROWS", 4)
    draw(tmp_path / "a.png", 600, [0, 599])
    (figure,) = drawn
    width, height = figure.get_size_inches()
    assert len(frames(figure)) == 4 and width < 33 and height < 4 * 3.5 + 1
    assert frames(figure)[-1][1] == 600.5


def test_a_learning_curve_says_run_scale_and_whole_steps(tmp_path, drawn):
    (tmp_path / "my_run").mkdir()
    rows = [{"step": step, "split": "train", "perplexity": 20.0 - step} for step in (1, 2, 3)]
    plot_learning_curve(tmp_path / "my_run" / "curve.png", rows, {"unigram": 18.0})
    (figure,) = drawn
    (axes,) = figure.axes
    assert "my_run" in axes.get_title() and "log scale" in axes.get_ylabel()
    assert all(tick == int(tick) for tick in axes.get_xticks())
    labels = [t.label1.get_text() for t in axes.yaxis.get_minor_ticks() if t.label1.get_text()]
    assert labels and all(float(label) for label in labels)


def test_any_name_of_a_run_can_be_drawn(tmp_path, drawn):
    folder = tmp_path / "蛋\x1b\nfamille_é_$1$"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_learning_curve(folder / "curve.png", [])
    (figure,) = drawn
    title = figure.axes[0].get_title()
    assert "famille_é" in title and title.isprintable()
