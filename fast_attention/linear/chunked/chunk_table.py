"""Chunk sizes by platform; written by ``python -m benchmarks.chunk_sizes``, not by hand.

``CHUNKS[platform, causal, D, M]`` is the chunk and how many chunks are unrolled in the loop.
``MEASURED[platform]`` says how the rows of a platform came about: command, machine, date.
"""

CHUNKS = {
    ("cpu", False, 64, 64): (64, 1),
    ("cpu", False, 64, 128): (128, 1),
    ("cpu", False, 64, 256): (128, 1),
    ("cpu", False, 128, 256): (128, 1),
    ("cpu", True, 64, 64): (64, 1),
    ("cpu", True, 64, 128): (64, 1),
    ("cpu", True, 64, 256): (64, 1),
    ("cpu", True, 128, 256): (128, 1),
    ("gpu", False, 64, 256): (512, 1),
    ("gpu", True, 64, 256): (256, 1),
}

MEASURED = {
    "cpu": (
        "python -m benchmarks.chunk_sizes --length=4096",
        "AMD EPYC, 1 core(s), jax 0.10.2",
        "2026-11-22 07:42 UTC",
    ),
    "gpu": (
        "not measured: a guess",
        "none",
        "never",
    ),
}
