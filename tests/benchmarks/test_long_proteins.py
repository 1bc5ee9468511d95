"""The memory of a model of one layer, at lengths that take a second."""

from __future__ import annotations

from benchmarks import long_proteins


def test_memory_of_linear_attention_is_linear_in_the_length():
    rows = list(long_proteins.measure([256, 1024], layers=1, repeats=3))
    needed = {(row.attention, row.length): row.memory for row in rows}
    for name in ("FAVOR+", "wderf_s"):
        assert needed[name, 1024] < 4.2 * needed[name, 256]
    assert all(row.seconds > 0 for row in rows)
