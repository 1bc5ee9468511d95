"""A tiny model is linearized and compared; what is finished is not made again."""

from pathlib import Path

import numpy as np

from benchmarks import linearized_protein_models as benchmark
from fast_attention.protein_lm.runs.importing import import_model

MODEL = Path(__file__).parents[1] / "data" / "pretrained" / "bert_tiny"


def stages(exact, **others):
    return {name: {"perplexity": x} for name, x in {"exact": exact, **others}.items()}


def test_differences_are_taken_seed_by_seed():
    both = ["+2.000 ± 0.000", "+0.600 ± 0.100", "+0.000 ± 0.000"]
    found = {
        ("favor+", None): {0: stages(17.0, before=18.0, finetune=17.5)},
        ("hedgehog", 32): {
            0: stages(17.0, before=19.0, transfer=17.5, finetune=17.0, window_off=20.0),
            1: stages(16.0, before=18.0, transfer=16.7, finetune=16.0, window_off=20.0),
        },
        ("wderf_s", None): {},
    }
    lines = benchmark.make_table(found).splitlines()
    assert lines[0] == "Perplexity of exact attention: 16.500 ± 0.500"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert rows == [
        ["FAVOR+", "", "1", "+1.000", "", "+0.500", "", ""],
        ["Hedgehog", "32", "2", *both, "+3.500 ± 0.500", ""],
    ]


def test_one_model_with_and_without_a_window(tmp_path, capsys, monkeypatch):
    """A window as wide as the proteins is exact; a second call makes nothing again."""
    monkeypatch.setattr(benchmark, "train_and_evaluate", lambda *arguments: None)
    import_model(MODEL, tmp_path / "exact-0")
    arguments = [
        f"--folder={tmp_path}",
        "--seeds=0",
        "--transfer_steps=1",
        "--finetune=none",
        "--nb_features=4",
        "--max_length=8",
        "--proteins=2",
        "--estimators=hedgehog",
    ]
    benchmark.main([*arguments, f"--picture={tmp_path / 'picture.png'}"])
    table = capsys.readouterr().out
    features, window = (line.strip("| ").split(" | ") for line in table.splitlines()[-2:])
    assert [features[0], window[:3]] == ["Hedgehog", ["Hedgehog", "32", "1"]]
    assert abs(float(features[3])) > 1
    # The perplexity of this untrained model is above 1,000.
    np.testing.assert_allclose([float(loss) for loss in window[3:5]], 0, atol=0.02)
    assert (tmp_path / "picture.png").stat().st_size > 0
    benchmark.main([*arguments, "--report"])
    assert capsys.readouterr().out == table
