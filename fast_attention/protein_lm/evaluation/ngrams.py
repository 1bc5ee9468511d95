"""Counts of n-grams, kept sparsely, and the probabilities that follow from them.

An n-gram is a number of n digits, that of its oldest token the highest. Digits are those of
`Outcomes`: each ordinary token of the vocabulary, the begin, and the end. The remainder by
``base ** m`` is therefore the m-gram that an n-gram ends with, and all shorter counts follow from
the longest ones.

Shape letters: G distinct n-grams, N contexts or n-grams asked for, D digits.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.npz_files import read_npz
from fast_attention.protein_lm.files.output_files import write_file

_DENSE = 1 << 20
"""Up to this many possible n-grams are counted in one array; more are sorted."""


class Outcomes(NamedTuple):
    """What may come next in a sequence over a vocabulary, and its number as a digit.

    Ordinary tokens are ``0 .. num_ordinary - 1``, in the order of their ids; then come the begin,
    which only contexts have, and the end, if there is one. Padding and mask tokens have no digit.

    Attributes:
      num_ordinary: Ordinary tokens.
      has_end: Whether the vocabulary has an end token.
    """

    num_ordinary: int
    has_end: bool

    @classmethod
    def of(cls, vocab: Alphabet) -> Outcomes:
        """Those of a vocabulary."""
        return cls(len(vocab.ordinary_ids), vocab.eos is not None)

    @property
    def base(self) -> int:
        """D."""
        return self.num_ordinary + 1 + self.has_end

    @property
    def number(self) -> int:
        """How many outcomes there are: ordinary tokens and the end."""
        return self.num_ordinary + self.has_end

    @property
    def begin(self) -> int:
        """The digit of the begin."""
        return self.num_ordinary

    @property
    def max_order(self) -> int:
        """The longest n-gram that a signed number of 64 bits can hold."""
        order = 1
        while self.base ** (order + 1) < 2**63:
            order += 1
        return order

    def digits(self, ids: np.ndarray, vocab: Alphabet) -> np.ndarray:
        """The digits of some ids, int64.

        Args:
          ids: Ordinary and end tokens of `vocab`.
          vocab: That these outcomes are of.
        """
        return np.where(ids == vocab.eos, self.base - 1, vocab.ranks[ids])


_MAX_ORDER = 12
_MAX_BYTES = 2**31


class NGramCounts(NamedTuple):
    """How often each n-gram occurs.

    Attributes:
      order: n.
      keys: int64 ``[G]``, n-grams that occur, in order.
      counts: int64 ``[G]``.
      outcomes: What the digits are.
    """

    order: int
    keys: np.ndarray
    counts: np.ndarray
    outcomes: Outcomes

    @classmethod
    def of(
        cls, keys: np.ndarray, order: int, outcomes: Outcomes, counts: np.ndarray | None = None
    ) -> NGramCounts:
        """Adds up equal n-grams, each counted once or as often as `counts` says."""
        size = outcomes.base**order
        if size <= _DENSE:
            dense = np.bincount(keys, counts, size)
            found = np.flatnonzero(dense)
            totals = dense[found]
        elif counts is None:
            found, totals = np.unique(keys, return_counts=True)
        else:
            places = np.argsort(keys, kind="stable")
            keys = keys[places]
            first = np.flatnonzero(np.diff(keys, prepend=-1))
            found, totals = keys[first], np.add.reduceat(counts[places], first)
        return cls(order, found, totals.astype(np.int64), outcomes)

    def merge(self, other: NGramCounts) -> NGramCounts:
        """The sum of two counts of one order."""
        return NGramCounts.of(
            np.concatenate([self.keys, other.keys]),
            self.order,
            self.outcomes,
            np.concatenate([self.counts, other.counts]),
        )

    def shorten(self, order: int) -> NGramCounts:
        """The counts of a shorter order."""
        if order == self.order:
            return self
        base = self.outcomes.base
        return NGramCounts.of(self.keys % base**order, order, self.outcomes, self.counts)

    def following(self, contexts: np.ndarray) -> np.ndarray:
        """How often each token follows some contexts, float64 ``[N, D]``.

        Args:
          contexts: int ``[N]``, of ``order - 1`` digits.
        """
        base = self.outcomes.base
        first = np.searchsorted(self.keys, contexts * base)
        sizes = np.searchsorted(self.keys, contexts * base + base) - first
        rows = np.repeat(np.arange(len(contexts)), sizes)
        places = np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(len(rows))
        table = np.zeros((len(contexts), base))
        table[rows, self.keys[places] % base] = self.counts[places]
        return table

    def occurrences(self, keys: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """How often some n-grams, and their contexts, occur.

        Args:
          keys: int ``[N]``.

        Returns:
          For the orders 1 .. n two float64 arrays ``[N]``, of the n-gram and of its context.
        """
        found, base = [], self.outcomes.base
        for order in range(1, self.order + 1):
            shorter, wanted = self.shorten(order), keys % base**order
            below = np.concatenate([[0.0], np.cumsum(shorter.counts)])
            contexts = wanted - wanted % base

            def between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
                first, last = np.searchsorted(shorter.keys, [low, high])  # noqa: B023
                return below[last] - below[first]  # noqa: B023

            found.append((between(wanted, wanted + 1), between(contexts, contexts + base)))
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

    @property
    def outcomes(self) -> Outcomes:
        """What may come next."""
        return self.counts.outcomes

    def predict(self, contexts: np.ndarray) -> np.ndarray:
        """Probabilities after some contexts, float64 ``[N, D]``.

        Rows sum to 1; that of the begin is 0.

        Args:
          contexts: int ``[N]``, of ``order - 1`` digits.
        """
        outcomes = self.outcomes
        probabilities = np.full((len(contexts), outcomes.base), 1 / outcomes.number)
        probabilities[:, outcomes.begin] = 0
        for length, weight in enumerate(self.weights):
            contexts_here = contexts % outcomes.base**length
            count = self.counts.shorten(length + 1).following(contexts_here)
            probabilities *= weight
            probabilities += count
            probabilities /= count.sum(-1, keepdims=True) + weight
        return probabilities


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
        gaps=_narrow(np.diff(longest.keys, prepend=0)),
        counts=_narrow(longest.counts),
        order=np.array(longest.order),
        outcomes=np.array(longest.outcomes, np.int64),
        **weights,
    )
    write_file(path, archive.getvalue())


def load_baselines(path: Path) -> list[NGram]:
    """Reads what `save_baselines` wrote.

    Raises:
      RunError: If the file is absent, damaged, or holds other things.
    """
    remedy = "fetch the folder again, or train again to count the n-grams"
    tables = read_npz(path, remedy, limit=_MAX_BYTES)
    try:
        return _from_tables(tables)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise RunError(f"{path} is damaged ({error}): {remedy}") from error


def _from_tables(tables: dict[str, np.ndarray]) -> list[NGram]:
    num_ordinary, has_end = tables["outcomes"].tolist()
    outcomes = Outcomes(num_ordinary, bool(has_end))
    longest = int(tables["order"])
    if not 1 <= num_ordinary < 2**31 or not 1 <= longest <= _MAX_ORDER:
        raise ValueError(f"n-grams of the order {longest} over {num_ordinary} tokens")
    gaps, counts = tables["gaps"], tables["counts"]
    unsigned = gaps.dtype.kind == counts.dtype.kind == "u"
    if not unsigned or gaps.ndim != 1 or gaps.shape != counts.shape:
        raise ValueError("gaps and counts must be rows of unsigned integers, of one length")
    keys = np.cumsum(gaps, dtype=np.int64)
    if np.any(np.diff(keys) < 0) or (len(keys) and int(keys[-1]) >= outcomes.base**longest):
        raise ValueError("an n-gram has a token that is not in the vocabulary")
    found = NGramCounts(longest, keys, counts.astype(np.int64), outcomes)
    ngrams = []
    for order in sorted(int(name[8:]) for name in tables if name.startswith("weights_")):
        weights = tables[f"weights_{order}"].astype(np.float64)
        if not 1 <= order <= longest or weights.shape != (order,) or not np.all(weights > 0):
            raise ValueError(f"weights_{order} must be {order} positive numbers")
        ngrams.append(NGram(found.shorten(order), tuple(weights.tolist())))
    return ngrams


def _narrow(values: np.ndarray) -> np.ndarray:
    """Non-negative integers in the smallest type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
