"""Reads one very long text with a causal model, in memory that does not depend on its length.

The text goes through the model stretch by stretch; between two stretches the model keeps its
state, a few numbers for each head and feature. What comes out is what one call with the whole text
would give, which the first tokens are checked for.

The model is that of a run of ``protein-lm train``, which reads proteins one after the other and
never forgets one:

    python -m examples.long_context --run=runs/demo --length=1000000

Without a run it is a model of bytes, trained for a moment on windows of the text it then reads:

    python -m examples.long_context --file=README.md --length=1000000

What is shorter than that is read over and over.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.char_lm import windows
from fast_attention import make_fast_softmax_attention
from fast_attention.models import Transformer, TransformerConfig, next_token_loss
from fast_attention.models.training import make_train_step


class Text(NamedTuple):
    """What is read, and what is to be foretold.

    Attributes:
      inputs: int32 ``[L]``.
      targets: int32 ``[L]``, the token after each.
    """

    inputs: np.ndarray
    targets: np.ndarray


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


def proteins(run_dir: str, length: int) -> tuple[Any, Text]:
    """Reads a trained causal model, and bundled proteins that it has not been trained on.

    A protein begins with the begin token, as in training, but in training none sees another.
    """
    from fast_attention.protein_lm.data.corpus import bundled_corpus, load_corpus
    from fast_attention.protein_lm.data.domains import domain_to_bos
    from fast_attention.protein_lm.modeling.encoding import longest_input
    from fast_attention.protein_lm.modeling.train_state import weights
    from fast_attention.protein_lm.models import FlaxLM

    trained = FlaxLM.load(run_dir)
    room = longest_input(trained)
    if room is not None and room < length:
        raise SystemExit(
            f"the model of {run_dir} has positions for {room:,} tokens, not {length:,}: take one "
            "trained with FlaxModel.positions = 'rotary', or a smaller --length"
        )
    files = [str(bundled_corpus(split)) for split in ("test", "ood_test", "valid", "test_iid")]
    targets = load_corpus(files, trained.domain).tokens.astype(np.int32)
    targets = np.resize(targets, length)
    begin = domain_to_bos(trained.domain)
    before = np.concatenate([[begin], targets[:-1]])
    inputs = np.where(before == trained.domain.vocab.eos, begin, before).astype(np.int32)
    state = trained.state
    return nnx.merge(trained.graphdef, weights(state), state.variables), Text(inputs, targets)


@nnx.jit
def read_stretch(
    model: Transformer, state: Any, inputs: jax.Array, targets: jax.Array
) -> tuple[Any, Any, Any]:
    """Reads ``[1, C]`` tokens and foretells as many, those after them.

    Returns:
      The logits, the next state, and the sum of the targets' losses in bits.
    """
    logits, state = model.prefill(state, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return logits, state, losses.sum() / jnp.log(2.0)


def read(model: Transformer, text: Text, stretch: int) -> float:
    """Reads a whole text and returns the bits per token; the logits of a stretch are not kept."""
    state = model.init_state(1, max_length=stretch)
    total, told, began, count = 0.0, (0, 0.0), time.perf_counter(), len(text.inputs)
    for start in range(0, count, stretch):
        end = min(start + stretch, count)
        pieces = (jnp.asarray(x[None, start:end]) for x in text)
        _, state, bits = read_stretch(model, state, *pieces)
        total += float(bits)
        if end == count or start == 0 or 4 * end // count > 4 * told[0] // count:
            seconds = time.perf_counter() - began
            print(
                f"tokens {told[0]:,} to {end:,}: {(total - told[1]) / (end - told[0]):.3f} bits "
                f"per token; {end / seconds:,.0f} tokens/s so far, peak memory "
                f"{peak_memory() / 2**20:,.0f} MiB",
                flush=True,
            )
            told = end, total
    return total / count


def difference(model: Transformer, inputs: np.ndarray, stretch: int) -> float:
    """Returns the largest difference between logits by stretches and those of one call."""
    whole = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(inputs[None]))
    state, logits = model.init_state(1, max_length=stretch), []
    for start in range(0, len(inputs), stretch):
        piece = jnp.asarray(inputs[None, start : start + stretch])
        read, state, _ = read_stretch(model, state, piece, piece)
        logits.append(read)
    return float(jnp.abs(jnp.concatenate(logits, axis=1) - whole).max())


def peak_memory() -> int:
    """Returns the most bytes that this process has had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Reads as the command line says; returns bits per token and the difference of the check."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--run", help="folder of a run of a causal protein model, which is read with"
    )
    parser.add_argument("--file", type=Path, default=README, help="the text, without --run")
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

    if flags.run:
        model, text = proteins(flags.run, flags.length)
    else:
        data = np.frombuffer(flags.file.read_bytes(), np.uint8).astype(np.int32)
        tokens = np.resize(data, flags.length + 1)
        text = Text(tokens[:-1], tokens[1:])
        model = build(dim=flags.dim, depth=flags.depth, features=flags.features, seed=flags.seed)
        train(model, data, flags.steps, flags.window, flags.seed)
    apart = difference(model, text.inputs[: flags.check], max(1, flags.check // 4))
    print(f"the first {flags.check:,} tokens in one call and in four: {apart:.1e} apart")
    return read(model, text, flags.stretch), apart


if __name__ == "__main__":
    main()
