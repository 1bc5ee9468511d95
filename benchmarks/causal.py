"""Causal linear attention against a scan over single tokens, on one CPU core.

Run ``taskset -c 0 python -m benchmarks.causal`` (``--length 4096 --repeats 9``). CPU time, medians
of interleaved runs after warm-up, random inputs, B=1 H=8 D=64 M=256 float32; "f+b" is the value and
the gradients of query, key and value.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable


def main() -> None:
    """Prints one line a case: milliseconds, the ratio to the baseline, temporary memory."""
    parser = argparse.ArgumentParser(description="Causal linear attention on one core.")
    parser.add_argument("--length", type=int, default=4096, help="tokens (4096)")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each case (9)")
    options = parser.parse_args()
    # One thread: the ratios are those of one core. Read by XLA when jax is first imported.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    cases = _compile(options.length)
    times = {name: [] for name in cases}
    for run in range(options.repeats + 1):
        for name, call in cases.items():
            start = time.process_time()
            call()
            # Buffers are given back after the result is there: that is this run's cost, too.
            time.sleep(0.05)
            if run:
                times[name].append(time.process_time() - start)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        baseline = statistics.median(times[name.replace("chunked", "per token")])
        spread = (max(seconds) - min(seconds)) / median
        print(
            f"{name:16s} {median * 1e3:8.1f} ms  spread {spread:4.0%}  {baseline / median:5.2f} x"
        )


def _compile(length: int) -> dict[str, Callable[[], object]]:
    import jax
    import jax.numpy as jnp

    from benchmarks import per_token
    from fast_attention.feature_maps import PositiveFeatures
    from fast_attention.linear_attention import linear_attention

    feature_map = PositiveFeatures(256)
    projection = feature_map.init(jax.random.key(0), 64)
    arrays = [
        jax.random.normal(key, (1, length, 8, 64)) for key in jax.random.split(jax.random.key(1), 3)
    ]

    def chunked(q, k, v):
        return linear_attention(
            q, k, v, feature_map=feature_map, parameters=projection, causal=True
        )

    def baseline(q, k, v):
        return per_token.attention(q, k, v, projection)

    cases = {}
    for name, function in (("per token", baseline), ("chunked", chunked)):

        def loss(q, k, v, function=function):
            return jnp.sum(function(q, k, v) ** 2)

        forward = jax.jit(function).lower(*arrays).compile()
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
        for kind, program in (("forward", forward), ("f+b", both)):
            cases[f"{name} {kind}"] = lambda program=program: jax.block_until_ready(
                program(*arrays)
            )
            memory = program.memory_analysis()
            assert memory is not None
            size = memory.temp_size_in_bytes / 2**20
            print(f"{name + ' ' + kind:16s} {size:8.1f} MiB of temporaries")
    return cases


if __name__ == "__main__":
    main()
