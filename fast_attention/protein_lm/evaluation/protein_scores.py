"""Scores of each protein under a model and baselines, from one pass over a file.

Protocol: the first 1022 residues of each protein are scored (or as many as the model has room
for), the end token is not, and probabilities are those of the full vocabulary.

Shape letters: N proteins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.distributed import process_arrays
from fast_attention.protein_lm.evaluation.baselines import (
    MAX_RESIDUES,
    ProteinSums,
    ngram_name,
    ngram_sums,
)
from fast_attention.protein_lm.evaluation.ngrams import NGram, Outcomes
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.modeling import batches, pipeline, train_state

MODEL = "this model"


class ProteinScores(NamedTuple):
    """What became of each protein.

    Attributes:
      sums: By the name of the model or baseline, the model first; all over the same residues.
      lengths: int64 ``[N]``, residues of the whole proteins.
      max_residues: So many of each protein were looked at.
    """

    sums: dict[str, ProteinSums]
    lengths: np.ndarray
    max_residues: int


def score_proteins(
    model: FlaxModel,
    corpus: Corpus,
    ngrams: Sequence[NGram],
    *,
    batch_size: int | None = None,
    seeds: Sequence[int] = (0,),
) -> ProteinScores:
    """Scores a model and baselines on the same residues.

    A causal model is asked for every residue. Other models are asked for the residues that each
    seed chooses, and are shown the others; of the baselines only those that look at no neighbours
    can be compared then.

    Args:
      model: The model.
      corpus: Proteins loaded with the model's domain.
      ngrams: Baselines.
      batch_size: Proteins per batch; None takes the model's. It does not change the result.
      seeds: Of what is hidden, one pass each, the sums added up; a causal model hides nothing.
    """
    length = min(MAX_RESIDUES, model.max_length)
    order = pipeline.eval_order(corpus, length)
    found, parts = [], []
    for seed in seeds if model.objective.corrupts else (0,):
        batched = pipeline.eval_batches(
            corpus,
            model.domain,
            length=length,
            batch_size=model.batch_size if batch_size is None else batch_size,
            objective=model.objective,
            seed=seed,
            score_eos=False,
        )
        first = 0
        for batch in batched:
            proteins = order[first : first + len(batch["inputs"])]
            first += len(proteins)
            found.append((proteins, _row_sums(model, batch)))
            if not model.objective.exact:
                rows, columns = np.nonzero(batch["weights"][: len(proteins)])
                parts.append((proteins[rows], corpus.vocab.ranks[batch["targets"][rows, columns]]))
    sums = {MODEL: _gather(found, len(corpus))}
    if model.objective.exact:
        sums |= _causal_baselines(corpus, sums[MODEL].residues, length, ngrams)
    else:
        proteins, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
        sums |= _masked_baselines(proteins, targets, sums[MODEL].residues, model.domain, ngrams)
    ends = 0 if model.domain.vocab.eos is None else 1
    return ProteinScores(sums, corpus.lengths - ends, length)


def _row_sums(model: FlaxModel, batch: pipeline.Batch) -> train_state.metrics.Sums:
    return train_state.row_sums(
        model.graphdef,
        model.weights,
        model.variables,
        train_state.shard_batch(batch, model.mesh),
        packed=False,
    )


def _gather(found: list[tuple[np.ndarray, train_state.metrics.Sums]], number: int) -> ProteinSums:
    names = ("loss", "correct", "denominator")
    totals = {name: np.zeros(number) for name in names}
    for proteins, sums in process_arrays.fetch(found):
        for name in names:
            totals[name][proteins] += sums[name][: len(proteins)]
    return ProteinSums(*totals.values())


def _uniform(outcomes: int, residues: np.ndarray) -> dict[str, ProteinSums]:
    sums = ProteinSums(residues * np.log(outcomes), residues / outcomes, residues)
    return {f"uniform over {outcomes}": sums}


def _causal_baselines(
    corpus: Corpus,
    residues: np.ndarray,
    length: int,
    ngrams: Sequence[NGram],
) -> dict[str, ProteinSums]:
    whole = batches.crop(corpus, length)
    return _uniform(Outcomes.of(corpus.vocab).number, residues) | {
        ngram_name(ngram.order): ngram_sums(ngram, whole) for ngram in ngrams
    }


def _masked_baselines(
    proteins: np.ndarray,
    targets: np.ndarray,
    residues: np.ndarray,
    domain: DiscreteDomain,
    ngrams: Sequence[NGram],
) -> dict[str, ProteinSums]:
    """Only residues are predicted, so that the end of a sequence is no possible outcome."""
    outcomes = len(domain.vocab.ordinary_ids)
    found = _uniform(outcomes, residues)
    unigrams = [ngram for ngram in ngrams if ngram.order == 1]
    if not unigrams:
        return found
    shares = unigrams[0].predict(np.zeros(1, int))[0, :outcomes]
    probabilities = shares / shares.sum()
    number = len(residues)
    sums = ProteinSums(
        np.bincount(proteins, -np.log(probabilities[targets]), number),
        np.bincount(proteins, targets == probabilities.argmax(), number),
        residues,
    )
    return found | {"unigram": sums}
