"""The figures of the README: ``python -m benchmarks.causal``, our causal FAVOR+ beside a scan.

The same as ``python -m benchmarks`` with the options below; more can be given.
"""

from __future__ import annotations

import sys

from benchmarks.__main__ import main

OPTIONS = (
    "--lengths=4096",
    "--only=causal/favor-chunked,causal/per-token",
    "--repeats=9",
    "--output=runs/benchmarks-causal",
)

if __name__ == "__main__":
    main([*OPTIONS, *sys.argv[1:]])
