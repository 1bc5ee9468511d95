"""Counts of n-grams, kept sparsely, and the probabilities that follow from them.

An n-gram is a number of n digits to the base 27, the id of its oldest token the highest digit. Its
remainder by ``27 ** m`` is therefore the m-gram that it ends with, and all shorter counts follow
from the longest ones.

Shape letters: G distinct n-grams, N contexts or n-grams asked for.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.domains import make_protein_domain
from fast_attention.protein_lm.run_folder import write_file

_VOCAB = make_protein_domain(include_pad=False, include_mask=False).vocab
BOS, EOS = _VOCAB.encode("<>")
BASE = len(_VOCAB)
NUM_OUTCOMES = BASE - 1
"""20 residues, B, O, U, X, Z, and the end."""


class NGramCounts(NamedTuple):
    """How often each n-gram occurs.

    Attributes:
      order: n.
      keys: int64 ``[G]``, n-grams that occur, in order.
      counts: int64 ``[G]``.
    """

    order: int
    keys: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, order: int, counts: np.ndarray | None = None) -> NGramCounts:
        """Adds up equal n-grams, each counted once or as often as `counts` says."""
        dense = np.bincount(keys, counts, BASE**order)
        found = np.flatnonzero(dense)
        return cls(order, found, dense[found].astype(np.int64))

    def shorten(self, order: int) -> NGramCounts:
        """The counts of a shorter order."""
        if order == self.order:
            return self
        return NGramCounts.of(self.keys % BASE**order, order, self.counts)

    def following(self, contexts: np.ndarray) -> np.ndarray:
        """How often each token follows some contexts, float64 ``[N, 27]``.

        Args:
          contexts: int ``[N]``, of ``order - 1`` digits.
        """
        first = np.searchsorted(self.keys, contexts * BASE)
        sizes = np.searchsorted(self.keys, contexts * BASE + BASE) - first
        rows = np.repeat(np.arange(len(contexts)), sizes)
        places = np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(len(rows))
        table = np.zeros((len(contexts), BASE))
        table[rows, self.keys[places] % BASE] = self.counts[places]
        return table

    def occurrences(self, keys: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """How often some n-grams, and their contexts, occur.

        Args:
          keys: int ``[N]``.

        Returns:
          For the orders 1 .. n two float64 arrays ``[N]``, of the n-gram and of its context.
        """
        found = []
        for order in range(1, self.order + 1):
            shorter, wanted = self.shorten(order), keys % BASE**order
            below = np.concatenate([[0.0], np.cumsum(shorter.counts)])
            contexts = wanted - wanted % BASE

            def between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
                first, last = np.searchsorted(shorter.keys, [low, high])  # noqa: B023
                return below[last] - below[first]  # noqa: B023

            found.append((between(wanted, wanted + 1), between(contexts, contexts + BASE)))
        return found


class NGram(NamedTuple):
    """Conditional probabilities of the next token, by back-off from counts.

    Attributes:
      counts: of the training proteins.
      weights: ``k_1 .. k_n``, how much each shorter context weighs.
    """

    counts: NGramCounts
    weights: tuple[float, ...]

    @property
    def order(self) -> int:
        """n; the last ``n - 1`` tokens are the context."""
        return self.counts.order

    def predict(self, contexts: np.ndarray) -> np.ndarray:
        """Probabilities after some contexts, float64 ``[N, 27]``.

        Rows sum to 1; that of BOS is 0.

        Args:
          contexts: int ``[N]``, of ``order - 1`` digits to the base 27.
        """
        probabilities = np.full((len(contexts), BASE), 1 / NUM_OUTCOMES)
        probabilities[:, BOS] = 0
        for length, weight in enumerate(self.weights):
            count = self.counts.shorten(length + 1).following(contexts % BASE**length)
            probabilities *= weight
            probabilities += count
            probabilities /= count.sum(-1, keepdims=True) + weight
        return probabilities


class TabulatedNGram(NamedTuple):
    """An n-gram whose probabilities were stored in full, by versions before 5-grams.

    Attributes:
      order: n.
      probabilities: float64 ``[27 ** (n - 1), 27]``.
    """

    order: int
    probabilities: np.ndarray

    def predict(self, contexts: np.ndarray) -> np.ndarray:
        """Probabilities after some contexts, as in `NGram`."""
        return self.probabilities[contexts]


def save_baselines(path: Path, ngrams: Sequence[NGram]) -> None:
    """Writes n-grams, so that an evaluation needs no training data.

    Args:
      path: The file, ``.npz``.
      ngrams: Of several orders, counted in the same proteins: the counts of the highest order
        are stored, and those of the others follow from them.
    """
    longest = max(ngrams, key=lambda ngram: ngram.order).counts
    weights = {f"weights_{ngram.order}": np.array(ngram.weights) for ngram in ngrams}
    archive = io.BytesIO()
    np.savez_compressed(
        archive,
        allow_pickle=False,
        # Small numbers compress: 5-grams of seven million residues take two megabytes.
        gaps=np.diff(longest.keys, prepend=0).astype(np.int32),
        counts=longest.counts.astype(np.int32),
        order=np.array(longest.order),
        **weights,
    )
    write_file(path, archive.getvalue())


def load_baselines(path: Path) -> list[NGram | TabulatedNGram]:
    """Reads what `save_baselines` wrote, in this version or an earlier one."""
    with np.load(path) as stored:
        tables = dict(stored)
    if "gaps" not in tables:
        return [TabulatedNGram(int(order), table) for order, table in tables.items()]
    keys, counts = np.cumsum(tables["gaps"], dtype=np.int64), tables["counts"].astype(np.int64)
    longest = NGramCounts(int(tables["order"]), keys, counts)
    orders = sorted(int(name[8:]) for name in tables if name.startswith("weights_"))
    return [
        NGram(longest.shorten(order), tuple(tables[f"weights_{order}"].tolist()))
        for order in orders
    ]
