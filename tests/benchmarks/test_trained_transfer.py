"""Models that linearize made are measured beside the exact one, whole and in parts."""

from pathlib import Path

import pytest

from benchmarks import trained_transfer as benchmark
from fast_attention.protein_lm.linearize.config import LinearizeConfig
from fast_attention.protein_lm.linearize.run import run_linearize
from fast_attention.protein_lm.runs.importing import import_model

MODEL = Path(__file__).parents[1] / "data" / "pretrained" / "bert_tiny"


def rows(text, start):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(start)]


def test_a_window_as_wide_as_the_proteins_needs_no_features(tmp_path, capsys):
    """Then the model and the window alone predict as the exact model does, the features do not."""
    fasta = tmp_path / "some.fasta"
    fasta.write_text("".join(f">{i}\nMKTAYIAKQRLLGVES\n" for i in range(4)))
    import_model(MODEL, tmp_path / "exact")
    config = LinearizeConfig(
        estimator="hedgehog", nb_features=4, exact_window=30, transfer_steps=0, finetune="none"
    )
    run_linearize(tmp_path / "exact", tmp_path / "wide", [fasta], config=config)
    capsys.readouterr()
    folders = [f"--exact={tmp_path / 'exact'}", "--linear", str(tmp_path / "wide")]
    benchmark.main([*folders, f"--fasta={fasta}"])
    text = capsys.readouterr().out
    (exact,) = rows(text, "| exact")
    found = {stage: numbers for _, stage, *numbers in rows(text, "| wide")}
    for stage in ("linear, not trained", "features off"):
        predicted = [float(number) for number in found[stage]]
        assert predicted == pytest.approx([float(number) for number in exact[-2:]], rel=1e-5)
    assert float(found["window off"][1]) != float(exact[-1])
    layers = rows(text, "| 1 ") + rows(text, "| 2 ")
    assert [float(error) for _, error in layers] == [0.0, 0.0]
    with pytest.raises(SystemExit, match="absent"):
        benchmark.main(["--exact=absent", "--linear", "absent", f"--fasta={fasta}"])
