"""Memory of a training step against depth: ``python -m benchmarks.reversible``.

A stack of feed-forward layers in two streams, once with ordinary gradients and once reversible.
Printed are the bytes that the compiled step needs beside its inputs and outputs (so without the
parameters, which grow with depth in any case) and the time of a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import environment


class Measured(NamedTuple):
    """One stack.

    Attributes:
      engine: "plain" or "reversible".
      depth: Pairs of layers.
      temporary_bytes: Beside inputs and outputs.
      seconds: Of a step, the fastest of several.
    """

    engine: str
    depth: int
    temporary_bytes: int
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reversible",
        description="Memory of a training step against depth.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=(6, 12, 24), help="pairs of layers")
    add("--length", type=int, default=1024, help="T")
    add("--features", type=int, default=128, help="M; hidden layers have 4 M")
    add("--repeats", type=int, default=3, help="steps timed")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    environment.prepare(environment.detect_platform())
    print("| depth | gradients | MiB | s / step |\n|---|---|---|---|")
    for row in measure(options.depths, options.length, options.features, options.repeats):
        mebibytes = row.temporary_bytes / 2**20
        print(f"| {row.depth} | {row.engine} | {mebibytes:.1f} | {row.seconds:.3f} |")


def measure(depths: Sequence[int], length: int, features: int, repeats: int) -> list[Measured]:
    """Compiles and runs a step for every depth, in both ways."""
    # These import jax, which must not happen before the process is pinned to a core.
    from fast_attention.layers import residual, reversible_residual

    engines = {"plain": residual, "reversible": reversible_residual}
    return [
        Measured(name, depth, *_step(engine, depth, length, features, repeats))
        for depth in depths
        for name, engine in engines.items()
    ]


def _step(
    engine: Callable, depth: int, length: int, features: int, repeats: int
) -> tuple[int, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from fast_attention.layers import FeedForward

    layer = nnx.eval_shape(lambda: FeedForward(features, 4 * features, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(layer)
    random = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(random.normal(scale=features**-0.5, size=leaf.shape), leaf.dtype)

    parameters = tuple(jax.tree.map(draw, shapes) for _ in range(2 * depth))

    def apply(own, x, shared, saved):
        # As behind a norm, or a deep stack of random layers would overflow.
        return nnx.merge(graphdef, own)(x * jax.lax.rsqrt(1 + jnp.mean(x * x))), None

    def loss(parameters, x):
        y1, y2 = engine((apply,) * len(parameters), parameters, x, x)
        return jnp.mean(jnp.square(y1 + y2))

    @jax.jit
    def step(parameters, x):
        gradients = jax.grad(loss)(parameters, x)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, parameters, gradients)

    x = jnp.asarray(random.normal(size=(1, length, features)), jnp.float32)
    compiled = step.lower(parameters, x).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("This platform does not tell how much memory programs need.")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(parameters, x))
        times.append(time.perf_counter() - start)
    return analysis.temp_size_in_bytes, min(times)


if __name__ == "__main__":
    main()
