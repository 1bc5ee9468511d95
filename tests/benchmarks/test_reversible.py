"""The memory of stacks, at a size that takes a second."""

from __future__ import annotations

from benchmarks import reversible


def test_memory_grows_with_depth_only_where_inputs_are_kept(optimized):
    rows = reversible.measure([1, 3], length=64, features=8, repeats=1)
    needed = {(row.engine, row.depth): row.temporary_bytes for row in rows}
    assert needed["plain", 3] > 2 * needed["plain", 1]
    assert needed["reversible", 3] < 1.15 * needed["reversible", 1]
    assert all(row.seconds > 0 for row in rows)
