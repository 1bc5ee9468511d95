"""The table of given figures; every variant is a configuration that makes a model."""

from pathlib import Path

import gin
import pytest

from benchmarks.estimators_from_scratch import VARIANTS, main, table
from fast_attention.protein_lm import gin_registry, models


def run(valid, test, minutes=1.0):
    parts = {"valid": valid, "test": test}
    return {name: {"scores": [{"perplexity": x}]} for name, x in parts.items()} | {
        "minutes": minutes
    }


def test_differences_are_taken_seed_by_seed():
    found = {
        "exact": {0: run(17.0, 16.0), 1: run(18.0, 17.0)},
        "favor+": {0: run(17.1, 16.3), 1: run(18.3, 17.3), 2: run(20.0, 20.0)},
        "relu": {0: run(16.9, 16.0, 3.0)},
        "favor+ unit": {},
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(found).splitlines()]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["exact"] == ["2", "17.500 ± 0.500", "", "16.500 ± 0.500", "", "1.0"]
    assert rows["favor+"][2] == "+0.200 ± 0.100"
    assert rows["favor+"][4] == "+0.300 ± 0.000"
    assert rows["relu"] == ["1", "16.900", "-0.100", "16.000", "+0.000", "3.0"]
    assert "favor+ unit" not in rows


def test_what_is_not_trained_is_not_reported(tmp_path, capsys):
    main(["--report", f"--folder={tmp_path}"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_configuration(name):
    demo = Path(__file__).parents[2] / "protein_lm_configs" / "demo.gin"
    gin_registry.configure([demo], ["FlaxModel.num_layers = 1", *VARIANTS[name]])
    assert models.FlaxLM().graphdef
    gin.clear_config()
