"""Formulas of memory and communication against models and compiled programs."""

import dataclasses

import jax
import pytest

from benchmarks import scaling, scaling_formulas
from benchmarks.scaling_formulas import Layout, Shape

SHAPE = Shape(layers=2, width=64, heads=4, mlp=128, features=16, letters=29, rows=8, length=64)


def test_the_state_of_a_step_is_that_of_the_formula():
    found = scaling.Compiled(SHAPE, Layout())
    # Besides: the step, the optimiser's count, and a random key.
    assert found.state == pytest.approx(scaling_formulas.state_bytes(SHAPE, Layout()), abs=64)
    assert not found.collectives


def test_flops_are_those_that_the_compiler_counts():
    cost = scaling.lower(SHAPE, Layout())[0].compile().cost_analysis()["flops"]
    assert 0.5 < SHAPE.flops / cost < 2


@pytest.mark.eight_devices
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("layers", "layout", "kinds"),
    [
        (2, Layout(fsdp=2, sequence=4), ["all-gather", "collective-permute"]),
        (1, Layout(sequence=2, data=2, model=2), ["collective-permute"]),
    ],
    ids=str,
)
def test_what_devices_hold_and_exchange_is_that_of_the_formulas(layers, layout, kinds):
    cells = scaling.compared(dataclasses.replace(SHAPE, layers=layers), layout)
    for kind in kinds:
        expected, found = cells[kind]
        assert found == pytest.approx(expected, rel=0.03), kind


def test_collectives_are_read_from_a_program():
    text = """
      %a = f32[2,300]{1,0} all-reduce(f32[2,300] %x), replica_groups={}
      %b = (f32[4]{0}, bf16[1024]{0}) all-gather-start(%y)
      %c = f32[8]{0} collective-permute(%z)
    """
    assert scaling.collectives(text) == {"all-reduce": 2400, "all-gather": 2064}


def test_plans_fit_or_say_so(capsys):
    scaling.main(["plan"])
    told = capsys.readouterr().out
    assert "113,443,870 parameters" in told
    rows = [line.split("|") for line in told.splitlines() if line.startswith("| ")]
    for row in rows:
        if row[1].strip().replace(",", "").isdigit():
            fits = float(row[5]) + float(row[6]) <= 64
            assert fits != ("none fits" in row[3])
