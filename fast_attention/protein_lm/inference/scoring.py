"""How probable proteins are to a model.

A causal model gives the exact probability of a protein, a product over its residues. A masked model
gives the pseudo-likelihood: the product of the probabilities of every residue, each hidden in turn
and seen all others (Salazar et al. 2020, arXiv:1910.14659, section 2).

Logarithms are natural, probabilities are over the whole vocabulary; a sequence's result does not
depend on what it shares a batch with.

Letters: n residues of a sequence, B batch, T length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from fast_attention.protein_lm.modeling import token_batches, train_state
from fast_attention.protein_lm.modeling.encoding import (
    Encoded,
    encode_sequences,
    row_lengths,
    with_begin,
    with_end,
)
from fast_attention.protein_lm.modeling.metrics import perplexity

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel


class SequenceScore(NamedTuple):
    """What a causal model says of a protein.

    Attributes:
      num_residues: Residues scored, n.
      log_likelihood: Sum of ``log p(x_t | x_1 .. x_t-1)`` over the residues.
      log_likelihood_with_end: The same with the probability that the protein ends there; NaN for a
        cropped one, and where the model has no end token.
    """

    num_residues: int
    log_likelihood: float
    log_likelihood_with_end: float

    @property
    def mean_log_likelihood(self) -> float:
        """Per residue."""
        return self.log_likelihood / self.num_residues

    @property
    def perplexity(self) -> float:
        """``exp(-mean_log_likelihood)``: among how many residues the model in effect wavers."""
        return perplexity(-self.mean_log_likelihood)


class PseudoScore(NamedTuple):
    """What a masked model says of a protein.

    Attributes:
      num_residues: Residues scored, n.
      pseudo_log_likelihood: Sum of ``log p(x_t | all other residues)`` over the residues.
    """

    num_residues: int
    pseudo_log_likelihood: float

    @property
    def mean_pseudo_log_likelihood(self) -> float:
        """Per residue."""
        return self.pseudo_log_likelihood / self.num_residues

    @property
    def pseudo_perplexity(self) -> float:
        """``exp(-mean_pseudo_log_likelihood)``."""
        return perplexity(-self.mean_pseudo_log_likelihood)


def score_sequences(
    model: BuiltModel, sequences: Iterable[str], **options: Any
) -> Iterator[SequenceScore | PseudoScore]:
    """Scores proteins, in their order.

    Args:
      model: A `FlaxLM` or a `FlaxBERT`.
      sequences: Residues, in upper case; read as they are needed.
      **options: Those of `residue_log_likelihoods`.

    Yields:
      A `SequenceScore` (`FlaxLM`) or a `PseudoScore` (`FlaxBERT`) for each.

    Raises:
      ValueError: As `residue_log_likelihoods`.
    """
    return map(sum_up(model), residue_log_likelihoods(model, sequences, **options))


def residue_log_likelihoods(
    model: BuiltModel,
    sequences: Iterable[str],
    *,
    tokens_per_batch: int = token_batches.TOKENS_PER_BATCH,
    max_length: int | None = None,
    shapes: set[token_batches.Shape] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[np.ndarray, float]]:
    """Scores every residue of proteins, in their order.

    A causal model reads a protein once. A masked model reads one of n residues n times, so that
    its cost grows with the square of the length.

    Args:
      model: A `FlaxLM` or a `FlaxBERT`.
      sequences: Residues, in upper case; read as they are needed.
      tokens_per_batch: Most tokens of a batch, padding included; less needs less memory. A longer
        protein has a batch of its own.
      max_length: Crops proteins to so many residues; None scores them whole.
      shapes: Gathers the shapes of batches, one for each program compiled.
      progress: Called with the number of residues scored since its last call.

    Yields:
      ``log p`` of the residues, float32 ``[n]``, and that of the end token of a causal model, NaN
      where there is none (see `SequenceScore`).

    Raises:
      ValueError: At a sequence that is empty, has a letter that the model does not know, or more
        residues than it has learned positions.
    """
    encoded = encode_sequences(model, sequences, max_length=max_length)
    shapes = set() if shapes is None else shapes
    return score_encoded(model, encoded, tokens_per_batch, shapes, progress)


def score_encoded(
    model: BuiltModel,
    proteins: Iterable[Encoded],
    tokens_per_batch: int,
    shapes: set[token_batches.Shape],
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[np.ndarray, float]]:
    """Scores every residue of encoded proteins; see `residue_log_likelihoods`."""
    score = _score_read if model.objective == "causal" else _score_hidden
    return score(model, proteins, tokens_per_batch, shapes, progress)


def plan_encoded(
    model: BuiltModel,
    proteins: Iterable[Encoded],
    tokens_per_batch: int,
    shapes: set[token_batches.Shape],
) -> None:
    """Adds the shapes that `score_encoded` would, so that what follows is computed as after it."""
    causal = model.objective == "causal"
    lengths = (
        length
        for item in proteins
        for length in (
            [len(item.residues) + 1]
            if causal
            else itertools.repeat(len(with_end(model, item)), len(item.residues))
        )
    )
    token_batches.plan_stream(lengths, tokens_per_batch, shapes, devices=model.mesh.size)


def computed_tokens(model: BuiltModel, protein: Encoded) -> int:
    """Tokens that are computed to score a protein, about."""
    tokens = len(protein.residues) + 1
    return tokens if model.objective == "causal" else tokens * len(protein.residues)


def _score_read(
    model: BuiltModel,
    encoded: Iterable[Encoded],
    tokens_per_batch: int,
    shapes: set[token_batches.Shape],
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[np.ndarray, float]]:
    state = model.state

    def compute(items: list[Encoded], shape: token_batches.Shape) -> jax.Array:
        wanted = [with_end(model, item) for item in items]
        given = [with_begin(model, tokens[:-1]) for tokens in wanted]
        batch = {
            "inputs": token_batches.fill(given, shape),
            "targets": token_batches.fill(wanted, shape),
            "lengths": row_lengths(wanted, shape[0]),
        }
        batch = train_state.shard_batch(batch, model.mesh)
        return model.residue_step(model.weights, state.variables, **batch)

    def take(found: np.ndarray, row: int, item: Encoded) -> tuple[np.ndarray, float]:
        n = len(item.residues)
        ended = len(with_end(model, item)) > n
        # A copy: a view would keep the results of the whole batch in memory.
        return found[row, :n].copy(), float(found[row, n]) if ended else math.nan

    def length(item: Encoded) -> int:
        return len(item.residues) + 1

    def report(items: list[Encoded]) -> None:
        if progress is not None:
            progress(sum(len(item.residues) for item in items))

    return token_batches.compute_stream(
        encoded,
        length,
        compute,
        take,
        tokens_per_batch,
        shapes,
        devices=model.mesh.size,
        progress=report,
    )


class _Hidden(NamedTuple):
    """A protein of which one residue is hidden."""

    protein: int
    tokens: np.ndarray
    place: int


def _score_hidden(
    model: BuiltModel,
    encoded: Iterable[Encoded],
    tokens_per_batch: int,
    shapes: set[token_batches.Shape],
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[np.ndarray, float]]:
    state, mask = model.state, model.domain.vocab.mask
    assert mask is not None  # FlaxBERT does not do without.

    def hide_each() -> Iterator[_Hidden]:
        for protein, item in enumerate(encoded):
            tokens = with_end(model, item)
            for place in range(len(item.residues)):
                yield _Hidden(protein, tokens, place)

    def compute(items: list[_Hidden], shape: token_batches.Shape) -> jax.Array:
        rows = [item.tokens for item in items]
        inputs = token_batches.fill(rows, shape)
        places, targets = np.zeros((2, shape[0]), np.int32)
        for row, item in enumerate(items):
            places[row], targets[row] = item.place, item.tokens[item.place]
            inputs[row, item.place] = mask
        batch = {
            "inputs": inputs,
            "targets": targets,
            "places": places,
            "lengths": row_lengths(rows, shape[0]),
        }
        batch = train_state.shard_batch(batch, model.mesh)
        return model.residue_step(model.weights, state.variables, **batch)

    def take(found: np.ndarray, row: int, item: _Hidden) -> tuple[int, float]:
        return item.protein, found[row]

    def length(item: _Hidden) -> int:
        return len(item.tokens)

    def report(items: list[_Hidden]) -> None:
        if progress is not None:
            progress(len(items))

    results = token_batches.compute_stream(
        hide_each(),
        length,
        compute,
        take,
        tokens_per_batch,
        shapes,
        devices=model.mesh.size,
        progress=report,
    )
    for _, found in itertools.groupby(results, key=lambda result: result[0]):
        yield np.array([value for _, value in found], np.float32), math.nan


def sum_up(
    model: BuiltModel,
) -> Callable[[tuple[np.ndarray, float]], SequenceScore | PseudoScore]:
    """Gives the function from what `residue_log_likelihoods` yields to the score of a protein."""

    def exact(result: tuple[np.ndarray, float]) -> SequenceScore:
        total = float(result[0].sum(dtype=np.float64))
        return SequenceScore(len(result[0]), total, total + result[1])

    def pseudo(result: tuple[np.ndarray, float]) -> PseudoScore:
        return PseudoScore(len(result[0]), float(result[0].sum(dtype=np.float64)))

    return exact if model.objective == "causal" else pseudo
