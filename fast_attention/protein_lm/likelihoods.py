"""How probable a causal model finds each residue of some proteins, given those before it.

Shape letters: B batch, T length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.array_types import Array, Float, Int
from fast_attention.protein_lm import batches, train_state
from fast_attention.protein_lm.flax_model import FlaxModel

TOKENS_PER_BATCH = 16384
_NUMBER_OF_WIDTHS = 32


def causal_log_probabilities(
    model: FlaxModel, sequences: Sequence[str], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[np.ndarray]:
    """Natural logarithms of the probability of each token, given those before it.

    Args:
      model: A causal model.
      sequences: Residues.
      tokens_per_batch: About how many tokens go through the model at a time.

    Returns:
      For each sequence float64 [T]: its residues, then its end token, which a sequence that fills
      the domain's length does not have.

    Raises:
      KeyError: At a letter that the vocabulary lacks.
      ValueError: If a sequence is empty or too long.
    """
    rows = token_rows(model, sequences)
    width = padded_width(max(map(len, rows)), model.max_length)
    number = max(1, min(tokens_per_batch // width, len(rows)))
    found: list[np.ndarray] = []
    for first in range(0, len(rows), number):
        some = rows[first : first + number]
        batch = _causal_batch(some, (number, width), model)
        state = model.state
        logits = model.score_step(
            state.parameters,
            state.variables,
            train_state.shard_batch(batch, model.mesh),
            packed=False,
        )
        chosen = np.asarray(chosen_log_probabilities(logits, batch["targets"]), np.float64)
        found += [values[: len(row)] for row, values in zip(some, chosen, strict=False)]
    return found


def token_rows(model: FlaxModel, sequences: Sequence[str]) -> list[np.ndarray]:
    """The ids of each sequence, and its end token where that fits; see `batches.as_corpus`.

    Raises:
      KeyError: At a letter that the vocabulary lacks.
      ValueError: If a sequence is empty or longer than the model can read.
    """
    corpus = batches.as_corpus(sequences, model.domain)
    longest = int(corpus.lengths.max())
    if longest > model.max_length:
        raise ValueError(
            f"a sequence has {longest} tokens, more than the {model.max_length} of the model: "
            "crop it first"
        )
    return np.split(corpus.tokens.astype(np.int32), corpus.offsets[1:-1])


def padded_width(length: int, room: int) -> int:
    """The least of at most 32 widths up to `room` that holds `length`: few programs, few idle."""
    stride = -(-room // _NUMBER_OF_WIDTHS)
    return min(-(-length // stride) * stride, room)


@jax.jit
def chosen_log_probabilities(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Logarithms of the probability of the targets, over the whole vocabulary."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def _causal_batch(
    rows: Sequence[np.ndarray], shape: tuple[int, int], model: FlaxModel
) -> dict[str, np.ndarray]:
    targets = np.zeros(shape, np.int32)
    visible = np.zeros(shape, bool)
    for number, row in enumerate(rows):
        targets[number, : len(row)] = row
        visible[number, : len(row)] = True
    inputs = np.roll(targets, 1, axis=1)
    inputs[:, 0] = model.domain.vocab.bos
    return {
        "inputs": np.where(visible, inputs, 0),
        "targets": targets,
        "weights": visible.astype(np.float32),
        "segment_ids": visible.astype(np.int32),
        "positions": np.where(visible, np.arange(shape[1])[None], 0).astype(np.int32),
    }
