"""Chunk sizes by kind of device or platform.

``CHUNKS[device, causal, D, M]`` is the chunk, how many chunks are unrolled in the loop, and how the
row came about: "measured" on the device, "estimated" by its compiler, or a "guess". A device is a
kind ("TPU v5e", "NVIDIA H100") or a platform ("cpu", "gpu", "tpu"). ``ORIGINS[device, how]`` says
with which command, on which machine or by which compiler, and when, for rows that are no guess.
``python -m benchmarks.chunk_sizes`` writes the measured rows of the device that it runs on.
"""

CHUNKS = {
    ("cpu", False, 64, 64): (64, 1, "measured"),
    ("cpu", False, 64, 128): (128, 1, "measured"),
    ("cpu", False, 64, 256): (128, 1, "measured"),
    ("cpu", False, 128, 256): (128, 1, "measured"),
    ("cpu", True, 64, 64): (64, 1, "measured"),
    ("cpu", True, 64, 128): (64, 1, "measured"),
    ("cpu", True, 64, 256): (64, 1, "measured"),
    ("cpu", True, 128, 256): (128, 1, "measured"),
    ("gpu", False, 64, 256): (512, 1, "guess"),
    ("gpu", True, 64, 256): (256, 1, "guess"),
    ("tpu", False, 64, 256): (512, 1, "estimated"),
    ("tpu", True, 64, 256): (256, 1, "estimated"),
}

ORIGINS = {
    ("cpu", "measured"): (
        "python -m benchmarks.chunk_sizes --length=4096",
        "AMD EPYC, 1 core(s), jax 0.10.2",
        "2026-11-22 07:42 UTC",
    ),
    ("tpu", "estimated"): (
        "python -m benchmarks.ahead_of_time.tpu --implementation=chunked",
        "libtpu 0.0.50.1 for TPU v5e, jax 0.12.0.1",
        "2026-11-30",
    ),
}
