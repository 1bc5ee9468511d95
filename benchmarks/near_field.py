"""Cost and error of the exact near field, over features and windows.

    taskset -c 0 python -m benchmarks.near_field

Time is that of causal attention, forward and with gradients, beside linear attention alone (window
0). The error is that of the output against softmax attention, relative, on queries and keys whose
logits fall off with distance, as those of trained heads tend to.

Shape letters: T length, H heads, D head width, M features, W window.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs import MEASURES, compile_jax
from benchmarks.settings import Inputs, Setting, make_inputs
from benchmarks.timing import Clock, Effort, interleave, median
from fast_attention import FastAttention, make_fast_softmax_attention
from fast_attention.softmax_attention import make_softmax_attention

WINDOWS = (0, 64, 128, 256)
FEATURES = (64, 256)
STRENGTH = 0.5
"""Largest logit that comes of position alone; as much again, as a standard deviation over 2, is of
content."""


def positional_heads(setting: Setting) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws heads whose logits are sums of ``cos(w (t - s))``, plus noise.

    Args:
      setting: the shape.

    Returns:
      Queries, keys and values ``[B, T, H, D]``.
    """
    shape = (setting.batch, setting.length, setting.heads, setting.head_dim)
    random = np.random.default_rng(0)
    frequency = 0.5 ** np.linspace(0, 8, setting.head_dim // 2)
    angle = np.arange(setting.length)[:, None] * frequency
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    waves = waves * np.sqrt(2 * STRENGTH * setting.head_dim**-0.5)
    noise = np.sqrt(STRENGTH / 2)
    arrays = (
        waves[:, None] + random.normal(scale=noise, size=shape),
        waves[:, None] + random.normal(scale=noise, size=shape),
        random.normal(size=shape),
    )
    query, key, value = (jnp.asarray(x, setting.dtype) for x in arrays)
    return query, key, value


def attention(inputs: Inputs, window: int) -> FastAttention:
    """Causal attention with the projection of the inputs; window 0 has no near field."""
    return make_fast_softmax_attention(
        projection_matrix=inputs.projection, unidirectional=True, exact_window=window or None
    )


def costs(inputs: Inputs, effort: Effort) -> dict[tuple[int, str], tuple[float, float]]:
    """Returns milliseconds, and memory in arrays of ``[B, T, H, D]``, by window and measure."""
    programs = {
        f"{window} {measure}": compile_jax(attention(inputs, window), inputs.qkv, inputs, measure)
        for window in WINDOWS
        for measure in MEASURES
    }
    times = interleave(programs, Clock(), effort)
    found = {}
    for name, program in programs.items():
        window, measure = name.split()
        memory = (program.memory or 0) / inputs.setting.tensor_bytes
        found[int(window), measure] = (1e3 * (median(times[name]) or float("nan")), memory)
    return found


def errors(inputs: Inputs, arrays: tuple[jax.Array, ...], exact: jax.Array) -> dict[int, float]:
    """Returns the relative error of the output by window.

    Args:
      inputs: where the projection comes from.
      arrays: queries, keys and values.
      exact: softmax attention of these.
    """
    size = jnp.linalg.norm(exact)
    return {
        window: float(jnp.linalg.norm(jax.jit(attention(inputs, window))(*arrays) - exact) / size)
        for window in WINDOWS
    }


def main() -> None:
    """Prints one table row a number of features and window."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.near_field",
        description="Cost and error of the exact near field.",
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens (4096)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (5)")
    options = parser.parse_args()
    print("| M | W | forward ms | f+b ms | forward memory | f+b memory | error |")
    print("|---|---|---|---|---|---|---|")
    arrays = positional_heads(Setting(length=options.length))
    exact = jax.jit(make_softmax_attention(unidirectional=True))(*arrays)
    for features in FEATURES:
        inputs = make_inputs(Setting(length=options.length, features=features))
        wrong = errors(inputs, arrays, exact)
        found = costs(inputs, Effort(repeats=options.repeats))
        for window in WINDOWS:
            (forward, small), (both, large) = (found[window, measure] for measure in MEASURES)
            print(
                f"| {features} | {window} | {forward:.0f} | {both:.0f} | {small:.1f} | {large:.1f} "
                f"| {wrong[window]:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
