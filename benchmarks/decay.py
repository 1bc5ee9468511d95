"""Cost of decay: ``taskset -c 0 python -m benchmarks.decay``.

Time and memory of causal attention with one decay a token and head, beside the same call without
decay, forward and with gradients (that of the decays included), with and without a window of exact
weights.

Shape letters: B batch, T length, H heads, M features, W window.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from benchmarks.programs import MEASURES, Program, compile_jax
from benchmarks.settings import Inputs, Setting, make_inputs
from benchmarks.timing import Clock, Effort, interleave, median
from fast_attention import make_fast_softmax_attention

CASES = ((256, 0), (64, 0), (256, 64), (64, 64))
"""M and W of each row; 0 is linear attention alone."""


def compile_pair(inputs: Inputs, window: int, measure: str) -> tuple[Program, Program]:
    """Compiles causal attention without decay, and with.

    Args:
      inputs: the arrays.
      window: W.
      measure: one of :data:`.programs.MEASURES`.
    """
    attend = make_fast_softmax_attention(
        projection_matrix=inputs.projection, unidirectional=True, exact_window=window or None
    )
    query = inputs.qkv[0]
    # Decays of a token between about 0.7 and 0.99, as trained models have them.
    gates = jax.random.normal(jax.random.key(5), query.shape[:3], query.dtype)
    log_decay = -jax.nn.softplus(gates - 3)

    def with_decay(query, key, value, log_decay):
        return attend(query, key, value, log_decay=log_decay)

    return (
        compile_jax(attend, inputs.qkv, inputs, measure),
        compile_jax(with_decay, (*inputs.qkv, log_decay), inputs, measure),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table row for each number of features, window and pass."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decay", description="Time and memory that decay costs."
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each (%(default)s)")
    options = parser.parse_args(arguments)
    print("| M | W | pass | ms | with decay | ratio | MiB | with decay | ratio |")
    print("| ---: | ---: | :-- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for features, window in CASES:
        inputs = make_inputs(Setting(length=options.length, heads=options.heads, features=features))
        for measure in MEASURES:
            pair = compile_pair(inputs, window, measure)
            times = interleave(
                dict(zip("01", pair, strict=True)), Clock(), Effort(repeats=options.repeats)
            )
            before, after = (1e3 * (median(times[name]) or float("nan")) for name in "01")
            small, large = ((program.memory or 0) / 2**20 for program in pair)
            print(
                f"| {features} | {window} | {measure} | {before:.1f} | {after:.1f} "
                f"| {after / before:.2f} | {small:.1f} | {large:.1f} | {large / small:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
