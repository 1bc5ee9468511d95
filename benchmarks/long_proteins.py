"""Proteins of many residues through a model of the shape of ESM-2 8M, exact and linear attention.

``python -m benchmarks.long_proteins`` runs one protein of each length through the model, on one
core, and prints processor time of a call and the memory of temporaries and results as the compiler
planned it. Weights are drawn at random: they change neither. The programs of a length take turns;
times are medians, or those of one call where three take more than a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.environment import use_one_core

LENGTHS = (1024, 4096, 16384)
FEATURES = 64


class Row(NamedTuple):
    """One length and attention function; ``memory`` in bytes, None if it is not known."""

    length: int
    attention: str
    seconds: float
    memory: int | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_proteins",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="residues")
    parser.add_argument(
        "--layers", type=int, default=6, help="fewer layers than the six of ESM-2 8M, for a trial"
    )
    parser.add_argument("--repeats", type=int, default=3, help="samples of each time (%(default)s)")
    options = parser.parse_args(arguments)
    use_one_core()
    print(f"{options.layers} layers, {FEATURES} features")
    print("| residues | attention | seconds | MiB |")
    print("| ---: | --- | ---: | ---: |")
    for row in measure(options.lengths, options.layers, options.repeats):
        memory = "" if row.memory is None else f"{row.memory / 2**20:,.0f}"
        print(f"| {row.length:,} | {row.attention} | {row.seconds:,.2f} | {memory} |", flush=True)


def measure(lengths: Sequence[int], layers: int, repeats: int) -> Iterator[Row]:
    """Measures length by length; `repeats` of at least 3."""
    # Only now: the process is pinned before jax starts its threads.
    import jax
    from flax import nnx

    from benchmarks.programs import jitted
    from benchmarks.timing import Clock, Effort, interleave, median
    from fast_attention import make_fast_softmax_attention
    from fast_attention.models import Transformer, TransformerConfig

    functions = {
        "exact": None,
        "FAVOR+": make_fast_softmax_attention(nb_features=FEATURES),
        "wderf_s": make_fast_softmax_attention(
            nb_features=FEATURES, estimator="wderf_s", projection="orthogonal_antithetic"
        ),
    }
    config = TransformerConfig(
        33,
        causal=False,
        num_layers=layers,
        emb_dim=320,
        num_heads=20,
        qkv_dim=320,
        mlp_dim=1280,
        positions="rotary",
        tie_embeddings=True,
        activation="gelu_exact",
        attention_bias=True,
        logits_transform=True,
        max_len=1026,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )
    for length in lengths:
        tokens = jax.random.randint(jax.random.key(1), (1, length), 4, 24)
        programs = {}
        for name, function in functions.items():
            model = Transformer(config, attention_fn=function, rngs=nnx.Rngs(0))
            graphdef, state = nnx.split(model)

            def logits(state, tokens, graphdef=graphdef):
                return nnx.merge(graphdef, state)(tokens, deterministic=True)

            programs[name] = jitted(logits, state, tokens)
        clock = Clock()
        found = interleave(programs, clock, Effort(repeats=repeats))
        for name, samples in found.items():
            # Of calls that are too long for a median, one is measured.
            seconds = median(samples) if samples else clock.seconds(programs[name], 1)
            assert seconds is not None
            yield Row(length, name, seconds, programs[name].memory)


if __name__ == "__main__":
    main()
