"""From FASTA files to batches of numbers, for training and for evaluation.

Every batch is a dictionary of arrays ``[B, L]``:

| key | dtype | content |
| --- | --- | --- |
| ``inputs`` | int32 | what the model is given |
| ``targets`` | int32 | what it must predict at the same position |
| ``weights`` | float32 | 1 where the prediction counts, else 0 |
| ``segment_ids`` | int32 | 1, 2, ... for the proteins of a row, 0 at padding |
| ``positions`` | int32 | 0, 1, ... within each protein |

Causal objective: a protein ``x1 .. xn`` has targets ``x1 .. xn EOS`` and inputs ``BOS x1 .. xn``.
Masked objective: targets ``x1 .. xn EOS``, inputs the same with some residues corrupted, and
weights at those. A cropped protein has no EOS unless the crop reaches its end; the inputs of a
crop begin with BOS, and its positions with 0, wherever it starts.

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
from fast_attention.protein_lm.data.domains import DiscreteDomain, domain_to_bos
from fast_attention.protein_lm.data.masking import MaskingConfig, mask_tokens, row_draws
from fast_attention.protein_lm.data.mixture import (
    Mixture,
    MixturePlanner,
    Weights,
    load_mixture,
)
from fast_attention.protein_lm.data.packing import (
    EpochPlanner,
    PackedRows,
    Pieces,
    fill_rows,
)
from fast_attention.protein_lm.data.skipped_records import SkippedRecords

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
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
    objective: str = "causal",
    crop: str = "random",
    masking: MaskingConfig | None = None,
    rows: tuple[int, int] | None = None,
) -> grain.IterDataset[Batch]:
    """Returns the batches of a training run.

    Batch i is a function of the arguments and of i alone. The iterator of the result therefore
    has a state of one number: ``set_state(state)`` continues at once, in any process, with the
    batch that would have come next after ``state = get_state()``. With ``rows``, a process builds
    only its part of each batch; the state does not tell which, so that a run goes on with another
    number of processes.

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
      row_length: L; None is ``length``. Proteins longer than a row are cropped, too.
      batch_size: B.
      seed: a number from 0 on, the seed of every choice.
      pack: whether several proteins share a row.
      shuffle: whether the order changes from epoch to epoch.
      num_epochs: how often every protein is seen (of a mixture: on average); None never stops.
      objective: ``"causal"`` or ``"masked"``.
      crop: whether long proteins are cropped at ``"random"`` places or at their ``"start"``.
      masking: shares of the masked objective; None takes the defaults of ``MaskingConfig``.
      rows: the first of the rows to build of each batch and the one after the last; None builds
        all. Row r is the same in any case.

    Raises:
      FastaError: if a file cannot be read.
      ValueError: if an argument or a weight is out of its range, or the vocabulary lacks a mask
        token that the objective needs.
    """
    _check(objective=(objective, ("causal", "masked")), crop=(crop, ("random", "start")))
    _check_numbers(length, batch_size, seed)
    width = length if row_length is None else row_length
    if width < 1:
        raise ValueError(f"row_length must be at least 1, or None, but got {row_length}.")
    _check_masking(objective, domain, masking)
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None, but got {num_epochs}.")
    source = load_source(fasta, domain)
    corpus = source.corpus if isinstance(source, Mixture) else source
    planner = _plan(source, length, width, seed, pack, shuffle, crop)
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
        if objective == "causal":
            return _causal_batch(packed, domain)
        draws = row_draws([seed, _TRAIN_MASKS, index], (batch_size, width), begin, end)
        return _masked_batch(packed, domain, draws, masking)

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
) -> int:
    """Returns how many batches ``make_dataset`` makes of the same arguments."""
    planner = _plan(source, length, row_length or length, 0, pack, False, "start")
    return -(-num_epochs * planner.num_rows // batch_size)


def _plan(
    source: Source, length: int, width: int, seed: int, pack: bool, shuffle: bool, crop: str
) -> EpochPlanner | MixturePlanner:
    plan = functools.partial(
        EpochPlanner,
        length=min(length, width),
        row_length=width,
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
    objective: str = "causal",
    seed: int = 0,
    masking: MaskingConfig | None = None,
    score_eos: bool = True,
) -> Iterator[Batch]:
    """Yields every protein once, one a row, cropped to its first ``length`` tokens.

    The longest come first. Rows have one of three lengths, ``length``, a half and a quarter of
    it, whichever the longest protein of the batch needs, so that a compiled model is compiled at
    most three times. Rows missing in the last batch are padding, of weight 0.

    What is masked in a protein depends on ``seed`` and on the protein's place in the files, and
    not on ``batch_size`` or on the other proteins.

    Args:
      fasta: one FASTA file or several, or proteins already loaded by ``load_corpus``.
      domain: gives the vocabulary, as in ``make_dataset``.
      length: the most tokens of a protein, its end token included.
      batch_size: B.
      objective: ``"causal"`` or ``"masked"``.
      seed: a number from 0 on, the seed of the masks.
      masking: shares of the masked objective; None takes the defaults of ``MaskingConfig``.
      score_eos: whether the end token has weight too; with False only residues count.

    Raises:
      FastaError: if a file cannot be read.
      ValueError: if an argument is out of its range, or the vocabulary lacks a mask token that
        the objective needs.
    """
    _check(objective=(objective, ("causal", "masked")))
    _check_numbers(length, batch_size, seed)
    _check_masking(objective, domain, masking)
    corpus = _load(fasta, domain)
    return _eval_batches(corpus, domain, length, batch_size, objective, seed, masking, score_eos)


def eval_order(corpus: Corpus, length: int) -> np.ndarray:
    """Which protein each row of `eval_batches` holds, int64 ``[N]``; rows beyond are padding."""
    return np.argsort(-np.minimum(corpus.lengths, length), kind="stable")


def _eval_batches(
    corpus: Corpus,
    domain: DiscreteDomain,
    length: int,
    batch_size: int,
    objective: str,
    seed: int,
    masking: MaskingConfig | None,
    score_eos: bool,
) -> Iterator[Batch]:
    lengths = np.minimum(corpus.lengths, length)
    order = eval_order(corpus, length)
    buckets = [-(-length // 4), -(-length // 2), length]
    for first in range(0, len(order), batch_size):
        proteins = order[first : first + batch_size]
        pieces = Pieces(
            proteins, np.zeros_like(proteins), lengths[proteins], np.arange(len(proteins))
        )
        width = next(bucket for bucket in buckets if bucket >= pieces.lengths[0])
        rows = fill_rows(corpus, pieces, (batch_size, width), domain.vocab.filler)
        if objective == "causal":
            batch = _causal_batch(rows, domain)
        else:
            draws = np.zeros((2, batch_size, width))
            for row, protein in enumerate(proteins.tolist()):
                size = lengths[protein]
                generator = np.random.default_rng([seed, _EVAL_MASKS, protein])
                draws[:, row, :size] = generator.random((2, size))
            batch = _masked_batch(rows, domain, draws, masking)
        if not score_eos:
            batch["weights"] *= batch["targets"] != domain.vocab.eos
        yield batch


def _causal_batch(rows: PackedRows, domain: DiscreteDomain) -> Batch:
    inputs = np.roll(rows.tokens, 1, axis=1)
    inputs[rows.positions == 0] = domain_to_bos(domain)
    visible = rows.segment_ids > 0
    return {
        "inputs": np.where(visible, inputs, rows.tokens),
        "targets": rows.tokens,
        "weights": visible.astype(np.float32),
        "segment_ids": rows.segment_ids,
        "positions": rows.positions,
    }


def _masked_batch(
    rows: PackedRows, domain: DiscreteDomain, draws: np.ndarray, masking: MaskingConfig | None
) -> Batch:
    inputs, chosen = mask_tokens(rows.tokens, rows.segment_ids, domain.vocab, draws, masking)
    return {
        "inputs": inputs,
        "targets": rows.tokens,
        "weights": chosen.astype(np.float32),
        "segment_ids": rows.segment_ids,
        "positions": rows.positions,
    }


def _load(
    fasta: FastaPaths | Corpus,
    domain: DiscreteDomain,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
) -> Corpus:
    if isinstance(fasta, Corpus):
        return fasta
    return load_corpus(fasta, domain, on_error=on_error, skipped=skipped)


def _check(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")


def _check_numbers(length: int, batch_size: int, seed: int) -> None:
    for name, value, least in (("length", length, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but got {value}.")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, but got {seed}.")


def _check_masking(objective: str, domain: DiscreteDomain, masking: MaskingConfig | None) -> None:
    if objective == "causal" and masking is not None:
        raise ValueError("masking is for objective='masked'; leave it out for 'causal'.")
    if objective == "masked" and domain.vocab.mask is None:
        raise ValueError(
            "objective='masked' needs a mask token: build the domain with include_mask=True."
        )
