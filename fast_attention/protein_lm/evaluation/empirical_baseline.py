"""The empirical baseline of the ProGen paper (arXiv:2004.03497), as Google's protein_lm has it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.modeling import metrics


class EmpiricalBaseline:
    """Predicts every residue with its share among the residues of some training data.

    Special tokens are neither counted nor scored. `baselines.fit_ngrams` of order 1 is the same
    with the end of a sequence as one more outcome.

    Attributes:
      distribution: float64, the probability of each ordinary token, in the order of their ids.
    """

    def __init__(self, domain: DiscreteDomain, train_ds: Iterable[Any], alpha: float = 1.0):
        """Counts tokens.

        Args:
          domain: Gives the vocabulary.
          train_ds: Batches or rows of ids, or strings.
          alpha: Laplace smoothing.

        Raises:
          TypeError: If `train_ds` is one string.
          ValueError: If `alpha` is negative, there is nothing to count, or at what is no id.
        """
        if not alpha >= 0:
            raise ValueError(f"alpha must be 0 or more; got {alpha}")
        if isinstance(train_ds, str):
            raise TypeError("expected several sequences, but got one string: give [sequence]")
        self._vocab = domain.vocab
        counts = np.zeros(len(domain.vocab.ordinary_ids))
        for batch in train_ds:
            counts += np.bincount(self._residues(batch), minlength=len(counts))
        counts += alpha
        if not counts.sum():
            raise ValueError("there is no residue to count, and alpha is 0")
        self.distribution = counts / counts.sum()

    def evaluate_batch(self, batch: Any) -> dict[str, np.ndarray]:
        """Scores a batch or a row of ids, or a string.

        Returns:
          Sums as `FlaxModel.evaluate_batch`, of the residues.
        """
        residues = self._residues(batch)
        with np.errstate(divide="ignore"):
            loss = -np.log(self.distribution[residues]).sum()
        correct = (residues == self.distribution.argmax()).sum()
        return metrics.per_batch({"loss": loss, "correct": correct, "denominator": len(residues)})

    def evaluate(self, ds: Iterable[Any], steps: int | None = None) -> dict[str, float]:
        """Mean loss, perplexity and accuracy over several batches.

        Args:
          ds: As for the constructor.
          steps: Batches to look at; None looks at all.

        Raises:
          ValueError: If there is no residue.
        """
        found = itertools.islice(ds, steps)
        return metrics.combine_metrics([self.evaluate_batch(batch) for batch in found])

    def _residues(self, batch: Any) -> np.ndarray:
        """The ordinary tokens of a batch as numbers among these."""
        ids = np.asarray(self._vocab.encode(batch) if isinstance(batch, str) else batch)
        if not self._vocab.are_valid(ids).all():
            raise ValueError(f"expected ids from 0 to {len(self._vocab) - 1}; got {batch}")
        ranks = self._vocab.ranks[ids.astype(np.int64).reshape(-1)]
        return ranks[ranks >= 0]
