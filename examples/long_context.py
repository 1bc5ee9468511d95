"""Reads one very long text with a causal model, in memory that does not depend on its length.

The text goes through the model stretch by stretch; between two stretches the model keeps its
state, a few numbers for each head and feature. What comes out is what one call with the whole text
would give, which the first tokens are checked for. The model is trained for a moment before, on
windows of the same text.

    python -m examples.long_context --file=README.md --length=1000000

A file shorter than that is read over and over.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.char_lm import windows
from fast_attention import make_fast_softmax_attention
from fast_attention.models import Transformer, TransformerConfig, next_token_loss
from fast_attention.models.training import make_train_step

README = Path(__file__).parent.parent / "README.md"


def build(*, dim: int, depth: int, features: int, seed: int) -> Transformer:
    """Makes a causal model of bytes with rotary positions, which have no last one."""
    config = TransformerConfig(
        vocab_size=256,
        emb_dim=dim,
        num_heads=max(1, dim // 32),
        num_layers=depth,
        qkv_dim=dim,
        mlp_dim=2 * dim,
        positions="rotary",
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )
    attention = make_fast_softmax_attention(nb_features=features, redraw_features=False)
    return Transformer(config, attention, rngs=nnx.Rngs(seed))


def train(model: Transformer, text: np.ndarray, steps: int, length: int, seed: int) -> None:
    """Trains on windows of a text."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    step = make_train_step(lambda model, tokens, rngs: next_token_loss(model, tokens))
    for _, batch in zip(range(steps), windows(text, length, 8, seed), strict=False):
        step(model, optimizer, batch, None)


@nnx.jit
def read_stretch(model: Transformer, state: Any, tokens: jax.Array) -> tuple[Any, Any, Any]:
    """Reads ``[1, C + 1]`` tokens, the last of which is only foretold.

    Returns:
      The logits, the next state, and the sum of the tokens' losses in bits.
    """
    logits, state = model.prefill(state, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return logits, state, losses.sum() / jnp.log(2.0)


def read(model: Transformer, tokens: np.ndarray, stretch: int) -> float:
    """Reads a whole text and returns the bits per token; the logits of a stretch are not kept."""
    state = model.init_state(1, max_length=stretch)
    total, began, count = 0.0, time.perf_counter(), len(tokens) - 1
    reported = 0
    for start in range(0, count, stretch):
        piece = jnp.asarray(tokens[None, start : start + stretch + 1])
        _, state, bits = read_stretch(model, state, piece)
        total += float(bits)
        end = min(start + stretch, count)
        if end == count or 4 * end // count > reported:
            reported = 4 * end // count
            seconds = time.perf_counter() - began
            print(
                f"{end:,} tokens: {total / end:.3f} bits per token, {end / seconds:,.0f} tokens/s, "
                f"peak memory {peak_memory() / 2**20:,.0f} MiB",
                flush=True,
            )
    return total / count


def difference(model: Transformer, tokens: np.ndarray, stretch: int) -> float:
    """Returns the largest difference between logits by stretches and those of one call."""
    whole = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens[None, :-1]))
    state, logits = model.init_state(1, max_length=stretch), []
    for start in range(0, len(tokens) - 1, stretch):
        piece = jnp.asarray(tokens[None, start : start + stretch + 1])
        read, state, _ = read_stretch(model, state, piece)
        logits.append(read)
    return float(jnp.abs(jnp.concatenate(logits, axis=1) - whole).max())


def peak_memory() -> int:
    """Returns the most bytes that this process has had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Reads as the command line says; returns bits per token and the difference of the check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", type=Path, default=README, help="the text")
    parser.add_argument("--length", type=int, default=1_000_000, help="tokens to read")
    parser.add_argument("--stretch", type=int, default=8192, help="tokens read at once")
    parser.add_argument("--check", type=int, default=2048, help="tokens also read in one call")
    parser.add_argument("--steps", type=int, default=50, help="of training")
    parser.add_argument("--window", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)

    text = np.frombuffer(flags.file.read_bytes(), np.uint8).astype(np.int32)
    tokens = np.resize(text, flags.length + 1)
    model = build(dim=flags.dim, depth=flags.depth, features=flags.features, seed=flags.seed)
    train(model, text, flags.steps, flags.window, flags.seed)
    apart = difference(model, tokens[: flags.check + 1], max(1, flags.check // 4))
    print(f"the first {flags.check:,} tokens in one call and in four: {apart:.1e} apart")
    return read(model, tokens, flags.stretch), apart


if __name__ == "__main__":
    main()
