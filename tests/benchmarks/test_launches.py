"""Launches are read off scheduled HLO: loops count their trips, views nothing."""

from benchmarks.ahead_of_time.gpu import kernel_figures
from benchmarks.ahead_of_time.launches import count_launches

HLO = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %square = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %square)
}

%rare (p: (pred[], f32[8])) -> (pred[], f32[8]) {
  %twice = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
}

%goes_on (p: (pred[], f32[8])) -> pred[] {
  ROOT %more = pred[] get-tuple-element(%p), index=0
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %view = f32[2,4]{1,0} bitcast(%a)
  %moved = f32[8]{0} copy(%a)
  %product = (f32[8]{0}, s8[64]{0}) custom-call(%a), custom_call_target="__cublas$gemm"
  %loop = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"16"}}
  %seldom = (pred[], f32[8]{0}) while(%u), condition=%goes_on, body=%rare
  ROOT %last = f32[8]{0} fusion(%moved), kind=kLoop, calls=%fused
}
"""  # noqa: E501

PTXAS = """\
ptxas warning : Registers are spilled to local memory in function 'k', 8 bytes spill stores, \
12 bytes spill loads
ptxas         .     8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 200 registers, used 2 barriers
"""


def test_launches_of_loops_and_calls():
    counts = count_launches(HLO)
    assert counts == {"copy": 1, "__cublas$gemm": 1, "fusion": 16 + 1, "while?": 1}


def test_registers_and_spills():
    assert kernel_figures(PTXAS) == ([255, 200], [12, 0])
