"""From FASTA files to batches of numbers, for training and for evaluation.

Every batch is a dictionary of arrays ``[B, L]``:

| key | dtype | content |
| --- | --- | --- |
| ``inputs`` | int32 | what the model is given |
| ``targets`` | int32 | what it must predict at the same position |
| ``weights`` | float32 | 1 where the prediction counts, else 0 |
| ``segment_ids`` | int32 | 1, 2, ... for the proteins of a row, 0 at padding |
| ``positions`` | int32 | 0, 1, ... within each protein |

What inputs and targets are is said by the objective, see `objectives`. A cropped protein has no
end token unless the crop reaches its end; the positions of a crop begin with 0, wherever it starts.

Letters: B batch, L row length.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus, FastaPaths, load_corpus
from fast_attention.protein_lm.data.corpus import bundled_corpus as bundled_corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.data.mixture import Mixture, MixturePlanner, Weights, load_mixture
from fast_attention.protein_lm.data.packing import EpochPlanner, Pieces, fill_rows
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.modeling.objectives import Objective, get_objective
from fast_attention.protein_lm.modeling.objectives.base import Batch as Batch
from fast_attention.protein_lm.ranges import check_choice

if TYPE_CHECKING:
    import grain

Source = Corpus | Mixture
"""Proteins in memory that training batches are made of."""

# Seeds of unlike draws differ in this number (that of packing.py is 1).
_TRAIN_MASKS, _EVAL_MASKS = 2, 3


def make_dataset(
    fasta: FastaPaths | Weights | Source,
    domain: DiscreteDomain,
    *,
    length: int,
    row_length: int | None = None,
    batch_size: int,
    seed: int,
    pack: bool = True,
    shuffle: bool = True,
    num_epochs: int | None = None,
    objective: Objective | str = "causal",
    crop: str = "random",
    rows: tuple[int, int] | None = None,
) -> grain.IterDataset[Batch]:
    """Returns the batches of a training run.

    Batch i is a function of the arguments and of i alone. The iterator of the result therefore
    has a state of one number: ``set_state(state)`` continues at once, in any process, with the
    batch that would have come next after ``state = get_state()``. With ``rows``, a process builds
    only its part of each batch; the state does not name the part, so that a run
    can resume with another number of processes.

    Proteins take other rows, and long ones are cropped elsewhere, in every epoch. Without end
    (``num_epochs=None``) a batch may hold the last rows of one epoch and the first of the next;
    otherwise the last batch is filled up with rows of padding, of weight 0.

    Of a mixture, every 1000 rows from a multiple of 1000 on hold 1000 w / sum(w) rows of a file of
    weight w (rounded, see ``mixture.row_shares``), evenly spread. Each file is packed by itself, so
    that this is its share of the residues, too, but for padding. It is begun anew whenever it ends,
    and an epoch has as many rows as the files have together.

    Args:
      fasta: one FASTA file or several, a dict from files to weights, or what ``load_source`` made
        of those (which also leaves out records that cannot be read).
      domain: gives the vocabulary. Rows are padded with its padding token; failing that with its
        end token; failing both with 0.
      length: the most tokens of a protein; longer ones are cropped.
      row_length: L; None is the room that a protein of ``length`` tokens takes. Proteins longer
        than a row are cropped, too.
      batch_size: B.
      seed: a number from 0 on, the seed of every choice.
      pack: whether several proteins share a row.
      shuffle: whether the order changes from epoch to epoch.
      num_epochs: how often every protein is seen (of a mixture: on average); None never stops.
      objective: an objective, or the name of one with its defaults, see `objectives`.
      crop: whether long proteins are cropped at ``"random"`` places or at their ``"start"``.
      rows: the first of the rows to build of each batch and the one after the last; None builds
        all. Row r is the same in any case.

    Raises:
      FastaError: if a file cannot be read.
      ValueError: if an argument or a weight is out of its range, or the vocabulary lacks a mask
        token that the objective needs.
    """
    objective = get_objective(objective)
    check_choice("crop", crop, ("random", "start"))
    _check_numbers(length, batch_size, seed)
    width = int(objective.room(length)) if row_length is None else row_length
    if width < 1:
        raise ValueError(f"row_length must be at least 1, or None, but got {row_length}.")
    objective.check(domain.vocab)
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None, but got {num_epochs}.")
    source = load_source(fasta, domain)
    corpus = source.corpus if isinstance(source, Mixture) else source
    planner = _plan(source, objective, length, width, seed, pack, shuffle, crop)
    num_rows = sys.maxsize if num_epochs is None else num_epochs * planner.num_rows
    begin, end = rows or (0, batch_size)
    if not 0 <= begin < end <= batch_size:
        raise ValueError(
            f"rows must be a first row and one after the last, within the {batch_size} of a batch, "
            f"but got {rows}."
        )

    def batch_at(index: int) -> Batch:
        first = index * batch_size + begin
        pieces = planner.pieces(first, max(min(end - begin, num_rows - first), 0))
        packed = fill_rows(corpus, pieces, (end - begin, width), domain.vocab.filler)
        numbers = [seed, _TRAIN_MASKS, index] if objective.corrupts else None
        draws = row_draws(numbers, (batch_size, width), begin, end)
        return objective.batch(packed, domain.vocab, draws)

    # Scoring and embedding do without, and are not to wait for this import.
    import grain

    return (
        grain.MapDataset.range(-(-num_rows // batch_size))
        .map(batch_at)
        # One batch takes about a millisecond: a single thread is far ahead of any model.
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    )


def load_source(
    fasta: FastaPaths | Weights | Source,
    domain: DiscreteDomain,
    *,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
) -> Source:
    """Reads what ``make_dataset`` takes, once for several uses.

    Args:
      fasta: as for ``make_dataset``; what is loaded already is returned as it is.
      domain: gives the vocabulary.
      on_error: what to do with a record that cannot be read, see ``load_corpus``.
      skipped: takes the records that were left out.

    Raises:
      FastaError: if a file cannot be read.
      ValueError: if a weight is out of its range.
    """
    if isinstance(fasta, Mapping):
        return load_mixture(fasta, domain, on_error, skipped)
    return fasta if isinstance(fasta, Mixture) else _load(fasta, domain, on_error, skipped)


def num_batches(
    source: Source,
    *,
    length: int,
    row_length: int | None = None,
    batch_size: int,
    num_epochs: int,
    pack: bool = True,
    objective: Objective | str = "causal",
) -> int:
    """Returns how many batches ``make_dataset`` makes of the same arguments."""
    objective = get_objective(objective)
    width = int(objective.room(length)) if row_length is None else row_length
    planner = _plan(source, objective, length, width, 0, pack, False, "start")
    return -(-num_epochs * planner.num_rows // batch_size)


def _plan(
    source: Source,
    objective: Objective,
    length: int,
    width: int,
    seed: int,
    pack: bool,
    shuffle: bool,
    crop: str,
) -> EpochPlanner | MixturePlanner:
    fitting = int(np.searchsorted(objective.room(np.arange(width + 1)), width, "right")) - 1
    if fitting < 1:
        raise ValueError(
            f"a row of {width} tokens is too short for one residue, which takes "
            f"{objective.room(1)} of them with the objective {objective.name}: raise row_length"
        )
    plan = functools.partial(
        EpochPlanner,
        length=min(length, fitting),
        row_length=width,
        room=objective.room,
        seed=seed,
        pack=pack,
        shuffle=shuffle,
        random_crop=crop == "random",
    )
    if not isinstance(source, Mixture):
        return plan(source)
    planners = [plan(part, stream=number) for number, part in enumerate(source.parts)]
    return MixturePlanner(planners, source.weights)


def eval_batches(
    fasta: FastaPaths | Corpus,
    domain: DiscreteDomain,
    *,
    length: int,
    batch_size: int,
    objective: Objective | str = "causal",
    seed: int = 0,
    score_eos: bool = True,
) -> Iterator[Batch]:
    """Yields every protein once, one a row, cropped to its first ``length`` tokens.

    The longest come first. Rows have one of three lengths, the room of a protein of ``length``
    tokens, a half and a quarter of it, whichever the longest protein of the batch needs, so that a
    compiled model is compiled at most three times. Rows missing in the last batch are padding, of
    weight 0.

    What is masked in a protein depends on ``seed`` and on the protein's place in the files, and
    not on ``batch_size`` or on the other proteins.

    Args:
      fasta: one FASTA file or several, or proteins already loaded by ``load_corpus``.
      domain: gives the vocabulary, as in ``make_dataset``.
      length: the most tokens of a protein, its end token included.
      batch_size: B.
      objective: as in ``make_dataset``.
      seed: a number from 0 on, the seed of the masks.
      score_eos: whether special tokens have weight too; with False only residues count.

    Raises:
      FastaError: if a file cannot be read.
      ValueError: if an argument is out of its range, or the vocabulary lacks a mask token that
        the objective needs.
    """
    objective = get_objective(objective)
    _check_numbers(length, batch_size, seed)
    objective.check(domain.vocab)
    corpus = _load(fasta, domain)

    def batches() -> Iterator[Batch]:
        lengths = np.minimum(corpus.lengths, length)
        order = eval_order(corpus, length)
        widest = int(objective.room(length))
        buckets = [-(-widest // 4), -(-widest // 2), widest]
        for first in range(0, len(order), batch_size):
            proteins = order[first : first + batch_size]
            pieces = Pieces(
                proteins, np.zeros_like(proteins), lengths[proteins], np.arange(len(proteins))
            )
            width = next(
                bucket for bucket in buckets if bucket >= objective.room(pieces.lengths[0])
            )
            rows = fill_rows(corpus, pieces, (batch_size, width), domain.vocab.filler)
            draws = np.zeros((2 * objective.corrupts, batch_size, width))
            for row, protein in enumerate(proteins.tolist() if objective.corrupts else ()):
                size = lengths[protein]
                generator = np.random.default_rng([seed, _EVAL_MASKS, protein])
                draws[:, row, :size] = generator.random((2, size))
                # A begin token moves the sequence, whose last token then needs draws as well.
                end = size + objective.enclose
                draws[:, row, size:end] = generator.random((2, end - size))
            batch = objective.batch(rows, domain.vocab, draws)
            if not score_eos:
                batch["weights"] *= domain.vocab.are_ordinary(batch["targets"])
            yield batch

    return batches()


def eval_order(corpus: Corpus, length: int) -> np.ndarray:
    """Which protein each row of `eval_batches` holds, int64 ``[N]``; rows beyond are padding."""
    return np.argsort(-np.minimum(corpus.lengths, length), kind="stable")


def row_draws(seed: list[int] | None, shape: tuple[int, int], begin: int, end: int) -> np.ndarray:
    """Rows of ``default_rng(seed).random((2, *shape))``, without computing the others.

    Args:
      seed: of the generator; None draws nothing.
      shape: ``(B, L)`` of the whole batch.
      begin: first of the rows.
      end: the row after the last.

    Returns:
      float64 ``[2, end - begin, L]``, or ``[0, end - begin, L]`` without a seed.
    """
    draws = np.zeros((0 if seed is None else 2, end - begin, shape[1]))
    for plane, rows in enumerate(draws):
        generator = np.random.PCG64(seed)
        # One number of the generator is one draw.
        generator.advance((plane * shape[0] + begin) * shape[1])
        rows[:] = np.random.Generator(generator).random(rows.shape)
    return draws


def _load(
    fasta: FastaPaths | Corpus,
    domain: DiscreteDomain,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
) -> Corpus:
    if isinstance(fasta, Corpus):
        return fasta
    return load_corpus(fasta, domain, on_error=on_error, skipped=skipped)


def _check_numbers(length: int, batch_size: int, seed: int) -> None:
    for name, value, least in (("length", length, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but got {value}.")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, but got {seed}.")
