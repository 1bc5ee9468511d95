"""Training throughput against length: ``python -m benchmarks.protein_training``.

The demo's model, once with its linear attention and once with exact attention, takes training steps
of equally many residues in rows of growing length. Both take turns on the same batches; printed are
medians of residues per second of the processor time that all cores spent (or, on an accelerator, of
the time on the wall).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import environment

LENGTHS = (512, 1024, 4096, 8192)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.protein_training",
        description="Residues per second of training, against the length of the rows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="residues of a row")
    add("--tokens", type=int, default=8192, help="residues of a batch")
    add("--steps", type=int, default=3, help="steps timed, after one that compiles")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    platform = environment.detect_platform()
    environment.prepare(platform, all_cores=True)
    clock = time.process_time if platform == "cpu" else time.perf_counter
    print("| length | rows | Performer, residues/s | exact, residues/s | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for length in options.lengths:
        rows = max(1, options.tokens // length)
        models = {
            name: model(name, length, options.layers, options.width)
            for name in ("Performer", "exact")
        }
        rates = measure(models, rows, length, options.steps, clock)
        performer, exact = rates["Performer"], rates["exact"]
        print(f"| {length} | {rows} | {performer:,.0f} | {exact:,.0f} | {performer / exact:.2f} |")


def measure(
    models: dict[str, Any], rows: int, length: int, steps: int, clock: Any
) -> dict[str, float]:
    """Residues per second of each model, in turns.

    Args:
      models: `FlaxLM` by name.
      rows: B.
      length: T.
      steps: Timed steps of each.
      clock: Seconds spent so far.

    Returns:
      The median over steps, by name.
    """
    import jax
    import numpy as np

    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps + 1):
        tokens = random.integers(0, 20, (rows, length + 1)).astype(np.int32)
        batch = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": np.ones((rows, length), np.float32),
            "segment_ids": np.ones((rows, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        }
        for name, model in models.items():
            start = clock()
            model.state, sums = model.train_step(model.state, batch)
            jax.block_until_ready(sums)
            if step:
                seconds[name].append(clock() - start)
    return {name: rows * length / statistics.median(times) for name, times in seconds.items()}


def model(name: str, length: int, layers: int, width: int) -> Any:
    """Returns the demo's language model with linear ("Performer") or exact attention."""
    # This imports jax, which must not happen before the process is prepared.
    from fast_attention import make_fast_softmax_attention
    from fast_attention.protein_lm.data.domains import make_protein_domain
    from fast_attention.protein_lm.models import FlaxLM

    linear = make_fast_softmax_attention(nb_features=64, chunk_size=32, unidirectional=True)
    return FlaxLM(
        make_protein_domain(length=length),
        attention_fn=linear if name == "Performer" else None,
        num_layers=layers,
        emb_dim=width,
        qkv_dim=width,
        num_heads=4,
        mlp_dim=4 * width,
        positions="rotary",
        shift_tokens=True,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )


if __name__ == "__main__":
    main()
