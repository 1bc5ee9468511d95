"""Chunk sizes by platform; written by ``python -m benchmarks.chunk_sizes``, not by hand.

``CHUNKS[platform, causal, D, M]`` is the chunk and how many chunks are unrolled in the loop.
``MEASURED[platform]`` says how the rows of a platform came about: command, machine, date.
"""

CHUNKS = {
    ("cpu", False, 64, 256): (128, 1),
    ("cpu", True, 64, 256): (64, 1),
    ("gpu", False, 64, 256): (512, 1),
    ("gpu", True, 64, 256): (256, 1),
}

MEASURED = {
    "cpu": (
        "by hand, with H=8 D=64 M=256",
        "one core",
        "before this table",
    ),
    "gpu": (
        "not measured: a guess",
        "none",
        "never",
    ),
}
