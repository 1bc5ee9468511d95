"""Rows of several sources in given proportions, each source packed and shuffled by itself.

Letters: K sources.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus, load_corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.data.packing import EpochPlanner, Pieces
from fast_attention.protein_lm.data.skipped_records import SkippedRecords

Weights = Mapping[str, float] | Mapping[PathLike[str], float]

# Rows after which the proportions are met to the row.
_PERIOD = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Sources in memory; made by `load_mixture`.

    Attributes:
      corpus: The proteins of all sources, one source after the other.
      parts: Those of each source, which share the memory of `corpus`.
      weights: Of the sources.
    """

    corpus: Corpus
    parts: tuple[Corpus, ...]
    weights: tuple[float, ...]


def load_mixture(
    weights: Weights,
    domain: DiscreteDomain,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
) -> Mixture:
    """Reads the sources.

    Args:
      weights: From FASTA files to weights.
      domain: Gives the vocabulary.
      on_error: What to do with a record that cannot be read, see `load_corpus`.
      skipped: Takes the records that were left out.

    Raises:
      ValueError: If a weight is out of its range.
    """
    row_shares(list(weights.values()))
    parts = [load_corpus(path, domain, on_error=on_error, skipped=skipped) for path in weights]
    return join_sources(parts, tuple(weights.values()))


def join_sources(parts: Sequence[Corpus], weights: tuple[float, ...]) -> Mixture:
    """The mixture of some corpora.

    Args:
      parts: The proteins of each source.
      weights: Of the sources.
    """
    tokens = np.concatenate([part.tokens for part in parts])
    shifts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    shifted = [part.offsets + shift for part, shift in zip(parts, shifts[:-1], strict=True)]
    whole = np.concatenate([offsets[:-1] for offsets in shifted] + [shifts[-1:]])
    vocab = parts[0].vocab
    shifted = tuple(Corpus(tokens, offsets, vocab) for offsets in shifted)
    return Mixture(Corpus(tokens, whole, vocab), shifted, weights)


def row_shares(weights: Sequence[float]) -> np.ndarray:
    """Rows that each source gets of every 1000, int64 ``[K]``: 1000 w / sum(w), rounded.

    What rounding down leaves over goes to the largest remainders, the earlier source first.

    Raises:
      ValueError: If a weight is not a positive number, or gets no row.
    """
    for weight in weights:
        if isinstance(weight, bool) or not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of a file must be a positive number; got {weight!r}")
    exact = _PERIOD * np.asarray(weights, np.float64) / math.fsum(weights)
    shares = np.floor(exact).astype(np.int64)
    missing = _PERIOD - int(shares.sum())
    shares[np.argsort(-(exact - shares), kind="stable")[:missing]] += 1
    if not shares.all():
        raise ValueError(
            f"a weight of {min(weights):g} among weights that sum to {math.fsum(weights):g} is "
            f"less than one row in {_PERIOD}: raise it, or leave the file out"
        )
    return shares


class MixturePlanner:
    """Says which pieces lie in which row; takes the place of one `EpochPlanner`.

    Row i of all epochs is row j of one of the sources, where source and j are functions of i alone:
    the sources take turns, each as evenly as its share allows, in an order that repeats after 1000
    rows. A source that comes to its end begins its next epoch, in another order.
    """

    def __init__(self, planners: Sequence[EpochPlanner], weights: Sequence[float]):
        """Takes one planner per source, over successive proteins of the corpus, and its weight."""
        self._planners = planners
        self._shares = row_shares(weights)
        self._first = np.cumsum([0, *(planner.num_proteins for planner in planners)])
        sources = np.repeat(np.arange(len(planners)), self._shares)
        turns = np.concatenate([np.arange(share) for share in self._shares])
        order = np.lexsort((sources, (turns + 0.5) / self._shares[sources]))
        self._sources, self._turns = sources[order], turns[order]

    @property
    def num_rows(self) -> int:
        """Rows of an epoch: as many as the sources have together."""
        return sum(planner.num_rows for planner in self._planners)

    def pieces(self, first_row: int, num_rows: int) -> Pieces:
        """Returns the pieces of rows ``first_row .. first_row + num_rows - 1``."""
        found = [self._planners[0].pieces(0, 0)]
        for row in range(num_rows):
            period, place = divmod(first_row + row, _PERIOD)
            source = int(self._sources[place])
            index = period * int(self._shares[source]) + int(self._turns[place])
            one = self._planners[source].pieces(index, 1)
            proteins = one.proteins + self._first[source]
            found.append(Pieces(proteins, one.starts, one.lengths, one.rows + row))
        return Pieces(
            *(
                np.concatenate([getattr(one, name) for one in found])
                for name in ("proteins", "starts", "lengths", "rows")
            )
        )
