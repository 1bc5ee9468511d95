"""Attention compiles for TPUs that are not here, to kernels alone."""

import importlib.util
import json

import pytest

from benchmarks.ahead_of_time import tpu as ahead_of_time
from benchmarks.ahead_of_time.tpu import Case
from benchmarks.programs import BACKWARD, FORWARD

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "causal", "decay"),
    [
        *(("v5e", True, decay) for decay in (False, True)),
        *((chip, False, False) for chip in ("v5e", "v5p")),
        ("v6e", True, False),
    ],
)
def test_both_passes_compile(chip, causal, decay, tmp_path):
    case = Case(chip, causal, BACKWARD, batch=1, length=600, heads=2, decay=decay)
    done = ahead_of_time._child(case, str(tmp_path), "", 600)
    assert not done.returncode, done.stderr
    program = (tmp_path / "program.txt").read_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2
    assert " while(" not in program
    assert json.loads((tmp_path / "memory.json").read_text()) < 2**24


def test_cycles_of_loops_count_once_a_trip():
    program = """HloModule m

%body (p: s32[]) -> s32[] {
  %add.1 = s32[] add(%p, %p), backend_config={"estimated_cycles":"7"}
}

%goes_on (p: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%p, %limit), direction=LT
}

ENTRY %main (x: s32[]) -> s32[] {
  %kernel.1 = s32[] custom-call(%x), custom_call_target="tpu_custom_call"
  %loop = s32[] while(%x), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %other = s32[] while(%x), condition=%goes_on, body=%body
}
"""
    assert ahead_of_time._cycles(program, {"kernel.1": 100}) == 100 + (5 + 3) * 7
    assert ahead_of_time._cycles(program, {"kernel.1": 100, "add.1": 2}) == 116


def test_roofline_of_the_standard_case():
    """Flops of features, states and pairs; bytes where M is small."""
    assert ahead_of_time.roofline(Case("v5e", True, FORWARD)) == pytest.approx(0.229, abs=1e-3)
    assert ahead_of_time.roofline(Case("v5e", False, BACKWARD)) == pytest.approx(0.523, abs=1e-3)
    small = Case("v5e", False, FORWARD, features=16)
    assert ahead_of_time.roofline(small) == pytest.approx(1e3 * 8 * 4096 * 8 * 512 / 819e9)
