"""How probable proteins are to a model.

A causal model gives the exact probability of a protein, a product over its residues. Other models
give the pseudo-likelihood: the product of the probabilities of every residue, each hidden in turn
and seen all others (Salazar et al. 2020, arXiv:1910.14659, section 2). The objective of a model
defines what is predicted (`Objective.questions`).

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
from fast_attention.protein_lm.modeling.encoding import Encoded, encode_sequences, row_lengths
from fast_attention.protein_lm.modeling.metrics import perplexity
from fast_attention.protein_lm.modeling.objectives.base import Question

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel


class SequenceScore(NamedTuple):
    """Scores of a protein by a causal model.

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
    """Scores of a protein by a model that is not causal.

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
      model: The model.
      sequences: Residues, in upper case; read as they are needed.
      **options: Those of `residue_log_likelihoods`.

    Yields:
      For each a `SequenceScore` where the objective of the model is exact, or a `PseudoScore`.

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

    A causal model reads a protein once. Other models read one of n residues n times, so that
    their cost grows with the square of the length.

    Args:
      model: The model.
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


class _Asked(NamedTuple):
    """A question about a protein, given by its number, and how many residues that has."""

    protein: int
    residues: int
    question: Question


def score_encoded(
    model: BuiltModel,
    proteins: Iterable[Encoded],
    tokens_per_batch: int,
    shapes: set[token_batches.Shape],
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[np.ndarray, float]]:
    """Scores every residue of encoded proteins; see `residue_log_likelihoods`."""

    def compute(items: list[_Asked], shape: token_batches.Shape) -> jax.Array:
        questions = [item.question for item in items]
        inputs = [question.inputs for question in questions]
        places = None
        if questions[0].place is not None:
            places = np.zeros(shape[0], np.int32)
            places[: len(items)] = [question.place or 0 for question in questions]
        width = shape[1] if places is None else 1
        batch = {
            "inputs": token_batches.fill(inputs, shape),
            "targets": token_batches.fill([q.targets for q in questions], (shape[0], width)),
            "lengths": row_lengths(inputs, shape[0]),
        }
        batch |= {} if places is None else {"places": places}
        batch = {"places": None} | train_state.shard_batch(batch, model.mesh)
        return model.residue_step(model.weights, model.variables, **batch)

    def take(found: np.ndarray, row: int, item: _Asked) -> tuple[_Asked, np.ndarray]:
        # A copy: a view would keep the results of the whole batch in memory.
        return item, found[row, : len(item.question.targets)].copy()

    def report(items: list[_Asked]) -> None:
        if progress is not None:
            progress(sum(min(len(item.question.targets), item.residues) for item in items))

    results = token_batches.compute_stream(
        _ask(model, proteins),
        _length,
        compute,
        take,
        tokens_per_batch,
        shapes,
        devices=model.mesh.size,
        progress=report,
    )
    for _, found in itertools.groupby(results, key=lambda result: result[0].protein):
        answers = list(found)
        values, residues = np.concatenate([value for _, value in answers]), answers[0][0].residues
        yield values[:residues], float(values[residues]) if len(values) > residues else math.nan


def plan_encoded(
    model: BuiltModel,
    proteins: Iterable[Encoded],
    tokens_per_batch: int,
    shapes: set[token_batches.Shape],
) -> None:
    """Adds the shapes that `score_encoded` would, so that what follows is computed as after it."""
    lengths = map(_length, _ask(model, proteins))
    token_batches.plan_stream(lengths, tokens_per_batch, shapes, devices=model.mesh.size)


def computed_tokens(model: BuiltModel, protein: Encoded) -> int:
    """Tokens that are computed to score a protein, about."""
    tokens = len(protein.residues) + 1
    return tokens if model.objective.exact else tokens * len(protein.residues)


def _ask(model: BuiltModel, proteins: Iterable[Encoded]) -> Iterator[_Asked]:
    for number, item in enumerate(proteins):
        for question in model.objective.questions(model.domain.vocab, item):
            yield _Asked(number, len(item.residues), question)


def _length(item: _Asked) -> int:
    return len(item.question.inputs)


def sum_up(
    model: BuiltModel,
) -> Callable[[tuple[np.ndarray, float]], SequenceScore | PseudoScore]:
    """Gives the function from what `residue_log_likelihoods` yields to the score of a protein."""

    def exact(result: tuple[np.ndarray, float]) -> SequenceScore:
        total = float(result[0].sum(dtype=np.float64))
        return SequenceScore(len(result[0]), total, total + result[1])

    def pseudo(result: tuple[np.ndarray, float]) -> PseudoScore:
        return PseudoScore(len(result[0]), float(result[0].sum(dtype=np.float64)))

    return exact if model.objective.exact else pseudo
