"""Rows of several proteins each, planned anew for every epoch from a seed.

A protein of more tokens than a row is cropped to a row. How many tokens of each protein are used
is therefore the same in every epoch, so that one packing of the *lengths* serves them all; an
epoch only chooses which protein takes which place of its length, where long ones are cropped, and
in which order the rows come. Any row of any epoch is then found without those before it, and a
training run resumes at once.

Letters: N proteins, R rows of an epoch, L row length, P pieces (proteins in some rows).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus

# Seeds of unlike draws differ in this number (those of data.py are 2 and 3).
_PLANS = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Where each part of a protein is placed.

    Attributes:
      proteins: int ``[P]``, index into the corpus.
      starts: int ``[P]``, first token used of the protein.
      lengths: int ``[P]``, number of tokens used.
      rows: int ``[P]``, row of the batch, not decreasing.
    """

    proteins: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of tokens, still without an objective.

    Attributes:
      tokens: int32 ``[B, L]``, padded with ``pad``.
      segment_ids: int32 ``[B, L]``, 1, 2, ... along a row and 0 at padding.
      positions: int32 ``[B, L]``, from 0 in every protein; 0 at padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def pack_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each item, int64 ``[N]``, by best-fit decreasing.

    Items are placed from long to short, each into the fullest row that still has room for it;
    this needs at most 11/9 of the least possible number of rows (and some), and hardly more than
    the least when there are many short items.

    Args:
      lengths: int ``[N]``, each in ``1 .. capacity``.
      capacity: length of a row.

    References:
      Johnson, Demers, Ullman, Garey, Graham. Worst-case performance bounds for simple
      one-dimensional packing algorithms. SIAM J. Comput. 3 (1974).
    """
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set if a row with room r is open: finding the tightest is one shift.
    open_room = 0
    num_rows = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = open_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                open_room &= ~(1 << room)
        else:
            room, row = capacity, num_rows
            num_rows += 1
        rows[item] = row
        left = room - length
        if left:
            open_rows[left].append(row)
            open_room |= 1 << left
    return rows


class EpochPlan(NamedTuple):
    """The choices of one epoch.

    Attributes:
      proteins: int ``[N]``, the protein that takes the place packed for protein i.
      starts: int ``[N]``, first token used of each protein.
      row_order: int ``[R]``, the packed row that comes as row r.
    """

    proteins: np.ndarray
    starts: np.ndarray
    row_order: np.ndarray


class EpochPlanner:
    """Says which pieces lie in which row of an epoch, as a pure function of seed and epoch."""

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        *,
        row_length: int | None = None,
        room: Callable[[Any], Any] = lambda lengths: lengths,
        seed: int,
        pack: bool,
        shuffle: bool,
        random_crop: bool,
        stream: int = 0,
    ):
        """Packs the lengths, once for all epochs.

        Args:
          corpus: the proteins.
          length: the most tokens of a protein.
          row_length: L; None is ``length``.
          room: from the lengths of proteins to the tokens that they take of a row.
          seed: seed of every choice.
          pack: whether several proteins share a row.
          shuffle: whether rows and proteins change places from epoch to epoch.
          random_crop: whether long proteins are cropped at random places, or at their start.
          stream: planners of unlike streams choose independently, of an equal seed.
        """
        self._lengths = np.minimum(corpus.lengths, length)
        self._spare = corpus.lengths - self._lengths
        self._seed = [seed, _PLANS]
        self._stream = [stream] * (stream > 0)
        self._shuffle = shuffle
        self._random_crop = random_crop
        self._by_length = np.argsort(self._lengths, kind="stable")
        rows = (
            pack_lengths(room(self._lengths), row_length or length)
            if pack
            else np.arange(len(corpus))
        )
        self._places = np.argsort(rows, kind="stable")
        self._row_bounds = np.searchsorted(rows[self._places], np.arange(rows.max() + 2))
        self._plans: dict[int, EpochPlan] = {}

    @property
    def num_proteins(self) -> int:
        """N."""
        return len(self._lengths)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._row_bounds) - 1

    def pieces(self, first_row: int, num_rows: int) -> Pieces:
        """Returns the pieces of rows ``first_row .. first_row + num_rows - 1``.

        Rows are counted through all epochs: row ``e * R + r`` is row r of epoch e.
        """
        # Of no rows at all, too, the pieces are arrays.
        proteins, starts, rows = ([np.zeros(0, np.int64)] for _ in range(3))
        for row in range(num_rows):
            epoch, number = divmod(first_row + row, self.num_rows)
            plan = self._plan(epoch)
            begin, end = self._row_bounds[plan.row_order[number] :][:2]
            chosen = plan.proteins[self._places[begin:end]]
            proteins.append(chosen)
            starts.append(plan.starts[chosen])
            rows.append(np.full(len(chosen), row))
        flat = np.concatenate(proteins)
        return Pieces(flat, np.concatenate(starts), self._lengths[flat], np.concatenate(rows))

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            # A batch may straddle two epochs; older plans are not needed again.
            recent = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            self._plans = {**recent, epoch: self._plan_anew(epoch)}
        return self._plans[epoch]

    def _plan_anew(self, epoch: int) -> EpochPlan:
        generator = np.random.default_rng([*self._seed, epoch, *self._stream])
        proteins = np.arange(len(self._lengths))
        row_order = np.arange(self.num_rows)
        if self._shuffle:
            row_order = generator.permutation(self.num_rows)
            shuffled = generator.permutation(len(proteins))
            # Both sides ascend in length: protein and place are of the same length.
            proteins[self._by_length] = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]
        starts = np.zeros_like(self._spare)
        if self._random_crop:
            starts = generator.integers(0, self._spare, endpoint=True)
        return EpochPlan(proteins, starts, row_order)


def fill_rows(corpus: Corpus, pieces: Pieces, shape: tuple[int, int], pad: int) -> PackedRows:
    """Lays pieces side by side into rows.

    Args:
      corpus: the proteins.
      pieces: what to place in each row; the pieces of a row must fit into it.
      shape: ``(B, L)``.
      pad: what to fill the rest with.
    """
    lengths = pieces.lengths
    ends = np.cumsum(lengths)
    first_of_row = np.searchsorted(pieces.rows, pieces.rows)
    segments = np.arange(len(lengths)) - first_of_row + 1
    columns = ends - lengths - (ends - lengths)[first_of_row]

    within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    target = np.repeat(pieces.rows * shape[1] + columns, lengths) + within
    source = np.repeat(corpus.offsets[pieces.proteins] + pieces.starts, lengths) + within

    tokens = np.full(shape, pad, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    tokens.reshape(-1)[target] = corpus.tokens[source]
    segment_ids.reshape(-1)[target] = np.repeat(segments, lengths)
    positions.reshape(-1)[target] = within
    return PackedRows(tokens, segment_ids, positions)
