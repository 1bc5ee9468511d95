"""The benchmark of a trained model, on a tiny BERT of random weights: resuming, masks, the page."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import trained_model as benchmark
from benchmarks.trained_model_figure import Row, draw_picture, make_table
from fast_attention.layers import with_attention
from fast_attention.models import load_pretrained

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "pretrained" / "bert_tiny"
IDS = benchmark.read_vocabulary(MODEL)


def command(folder, *more):
    arguments = [f"--model={MODEL}", f"--folder={folder}", "--sequences=2", "--features", "4"]
    return [*arguments, "--windows", "2", "--estimators", "favor+", *more]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "short.fasta"
    path.write_text(">a\nMKTAYIAKQRLLGVES\n>b\nACDEFGHIKL\n")
    return path


def test_an_interrupted_measurement_continues_where_it_was(fasta, tmp_path, monkeypatch, capsys):
    """Nothing is measured twice, neither after an interruption nor for more draws."""
    measure, count = benchmark.measure, 0

    def stop(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(benchmark, "measure", stop)
    arguments = command(tmp_path / "parts", f"--fasta={fasta}", "--draws=1")
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments)
    path = tmp_path / "parts" / benchmark.NUMBERS
    before = json.loads(path.read_text())["rows"]
    assert len(before) == 3
    benchmark.main(arguments)
    after = json.loads(path.read_text())["rows"]
    cases = len(benchmark.cases([4], [2], ["favor+"]))
    assert after[:3] == before and len(after) == cases and count == cases + 1
    assert (tmp_path / "parts" / benchmark.PICTURE).stat().st_size > 0
    benchmark.main([*arguments[:-1], "--draws=2"])
    again = json.loads(path.read_text())["rows"]
    assert again[:cases] == after
    assert {row["attention"] for row in again[cases:]} == {"ReLU", "favor+"}
    table = make_table([Row(**row) for row in again])
    assert table in capsys.readouterr().out
    with pytest.raises(SystemExit, match="measured with another sequences, masked residues"):
        benchmark.main([*arguments, "--sequences=1"])
    path.write_text("{")
    with pytest.raises(SystemExit, match="is damaged .*: remove it to begin again"):
        benchmark.main(arguments)


def test_residues_alone_are_hidden():
    """Begin, end and padding never are, and what is not hidden is given as it is."""
    sequences = ["MKTAYIAKQR", "ACDE"]
    ((given, true, hidden),) = benchmark.masked_batches(sequences, IDS, 1.0, 0)
    np.testing.assert_array_equal(hidden.sum(1), [10, 4])
    np.testing.assert_array_equal(given[hidden], IDS["[MASK]"])
    np.testing.assert_array_equal(true[1], [IDS[x] for x in ("[CLS]", *"ACDE", "[SEP]")] + [-1] * 6)
    seen = (true >= 0) & ~hidden
    np.testing.assert_array_equal(given[seen], true[seen])


def test_untrained_darkformer_is_favor_and_wide_windows_are_exact():
    """The two ends of what replaces exact attention, through a whole model."""
    exact = load_pretrained(MODEL).model
    batches = benchmark.masked_batches(["MKTAYIAKQR", "ACDEFGHIKL"], IDS, 0.5, 0)
    made = {(case.name, case.window): case.make for case in benchmark.cases([4], [30])}

    def found(name, window=None):
        return benchmark.measure(with_attention(exact, made[name, window](), nnx.Rngs(3)), batches)

    np.testing.assert_allclose(found("darkformer"), found("favor+"), rtol=1e-4)
    plain = benchmark.measure(exact, batches)
    for name in ("window alone", "wderf_s", "hedgehog"):
        np.testing.assert_allclose(found(name, 30), plain, rtol=1e-4)
    queries, keys, values = jnp.array(np.random.default_rng(0).normal(size=(3, 1, 7, 2, 4)))
    uniform = made["uniform", None]()(queries, keys, values)
    average = jnp.broadcast_to(values.mean(1), uniform.shape)
    np.testing.assert_allclose(uniform, average, rtol=1e-4, atol=1e-7)


def test_the_page_has_the_table_and_the_picture_of_its_numbers(tmp_path):
    numbers = json.loads((ROOT / "docs" / "images" / benchmark.NUMBERS).read_text())
    rows = [Row(**row) for row in numbers["rows"]]
    page = (ROOT / "docs" / "trained-models.md").read_text()
    assert make_table(rows) in page
    assert f"images/{benchmark.PICTURE}" in page
    assert f"{numbers['about']['masked residues']:,} masked residues" in page
    draw_picture(rows, tmp_path / "again.png", numbers["about"]["model"])
    assert (tmp_path / "again.png").stat().st_size < 150_000
