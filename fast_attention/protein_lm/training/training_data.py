"""The proteins of a run: those to train on, those to validate on, and what the two share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.data import held_out, pipeline
from fast_attention.protein_lm.data.corpus import Corpus, load_corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.data.fasta_files import read_proteins
from fast_attention.protein_lm.data.mixture import Mixture, join_sources
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.evaluation.report import shared_note
from fast_attention.protein_lm.modeling.batches import select
from fast_attention.protein_lm.runs.data_record import SPLITS
from fast_attention.protein_lm.wording import counted


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where the proteins of a run are.

    Attributes:
      train: FASTA files, or a dict from those to weights.
      valid: FASTA files of validations during training, or None.
      test: FASTA files of the evaluation at the end, or None.
      valid_fraction: Share of the sequences of `train` to hold out, where `valid` and `test` are
        None; 0 holds out none.
    """

    train: str | Sequence[str] | Mapping[str, float]
    valid: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    valid_fraction: float = 0.0

    def __post_init__(self):
        """Raises ValueError if `valid_fraction` is out of its range."""
        ranges.check("experiment.valid_fraction", self.valid_fraction, ranges.BELOW_ONE)

    @property
    def holds_out(self) -> bool:
        """Whether a part of `train` is held out for validation."""
        return self.valid is None and self.test is None and self.valid_fraction > 0

    @property
    def by_split(self) -> dict[str, Any]:
        """The files of ``train``, ``valid`` and ``test``."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @property
    def train_paths(self) -> list[str]:
        """The files to train on, without weights."""
        return [self.train] if isinstance(self.train, str) else list(self.train)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Proteins of a run, in memory.

    Attributes:
      train: To train on.
      valid: To validate on, or None.
      proteins: Number of proteins of each split.
      residues: Number of residues of each split.
      shared: By split, how many of its proteins are identical to one that is trained on.
      held_out: Numbers of the records of the training files that `valid` was made of, or None
        where these have files of their own.
      on_error: What was done with records that cannot be read.
      notes: Sentences that a user should read.
    """

    train: pipeline.Source
    valid: Corpus | None
    proteins: dict[str, int]
    residues: dict[str, int]
    shared: dict[str, int]
    held_out: np.ndarray | None
    on_error: str
    notes: list[str]


def load_training_data(
    files: DataFiles,
    domain: DiscreteDomain,
    *,
    on_error: str = "raise",
    skipped: Mapping[str, SkippedRecords],
) -> TrainingData:
    """Reads the proteins of a run, those of the evaluation at the end included.

    Args:
      files: Where they are.
      domain: Gives the vocabulary.
      on_error: What to do with a record that cannot be read, see `load_corpus`.
      skipped: Takes the records that were left out, for ``train`` and ``valid``.

    Raises:
      FastaError: If a file cannot be read.
      ValueError: If holding out leaves nothing of a file.
    """
    train = pipeline.load_source(files.train, domain, on_error=on_error, skipped=skipped["train"])
    hashes = held_out.sequence_hashes(_corpus(train))
    corpora: dict[str, Corpus] = {}
    shared: dict[str, int] = {}
    notes: list[str] = []
    valid = rows = None
    if files.holds_out:
        chosen = held_out.choose_held_out(hashes, files.valid_fraction)
        # One of each sequence says as much as all copies.
        rows = np.unique(np.where(chosen, hashes, 0), return_index=True)[1]
        rows = np.sort(rows[chosen[rows]])
        if len(rows):
            valid, train = select(_corpus(train), rows), _without(train, chosen, files)
            hashes = hashes[~chosen]
            verb = "is" if chosen.sum() == 1 else "are"
            notes.append(
                f"{chosen.sum():,} of {counted(len(chosen), 'protein')} {verb} held out for "
                f"validation ({100 * files.valid_fraction:g} % by the hash of the sequence, at "
                f"most {held_out.MOST:,}): give --valid_fasta to choose them, or "
                "experiment.valid_fraction = 0 for no validation"
            )
        else:
            rows = None
            notes.append(
                "nothing can be held out for validation, since --fasta has one protein, or copies "
                f"of one ({counted(len(hashes), 'record')}): {_NO_FIGURES}"
            )
    elif files.valid is None and files.test is None:
        notes.append(f"there are no proteins to validate on: {_NO_FIGURES}")
    for split in ("valid", "test"):
        if files.by_split[split] is None or (split == "test" and files.test == files.valid):
            continue
        left_out = skipped["valid"] if split == "valid" else SkippedRecords()
        found = load_corpus(files.by_split[split], domain, on_error=on_error, skipped=left_out)
        corpora[split] = found
        shared[split] = int(np.isin(held_out.sequence_hashes(found), hashes).sum())
        if note := shared_note(_NAMES[split], shared[split], len(found)):
            notes.append(note)
        valid = found if split == "valid" else valid
    corpora["train"] = _corpus(train)
    if valid is not None:
        corpora["valid"] = valid
    if files.test is not None and files.test == files.valid:
        corpora["test"] = corpora["valid"]
    splits = [split for split in SPLITS if split in corpora]
    return TrainingData(
        train,
        valid,
        proteins={split: len(corpora[split]) for split in splits},
        residues={split: _residues(corpora[split]) for split in splits},
        shared=shared,
        held_out=rows,
        on_error=on_error,
        notes=notes,
    )


_NAMES = {"valid": "validation", "test": "test"}
_NO_FIGURES = "give --valid_fasta to see how good the model is"


def held_out_fasta(
    files: DataFiles, domain: DiscreteDomain, rows: np.ndarray, *, on_error: str
) -> str:
    """The held-out proteins as the text of a FASTA file.

    Args:
      files: Where the proteins are.
      domain: Gives the letters of a record.
      rows: ``TrainingData.held_out``.
      on_error: As in `load_training_data`.
    """
    wanted = set(rows.tolist())
    sources = list(files.train) if isinstance(files.train, Mapping) else [files.train]
    records = (
        record
        for source in sources
        for record in read_proteins(
            source, alphabet=domain.vocab.symbols, on_error=on_error, skipped=SkippedRecords()
        )
    )
    return "".join(
        f"{f'>{record.id} {record.description}'.rstrip()}\n{record.sequence}\n"
        for number, record in enumerate(records)
        if number in wanted
    )


def _residues(corpus: Corpus) -> int:
    return int(corpus.offsets[-1]) - (corpus.vocab.eos is not None) * len(corpus)


def _corpus(source: pipeline.Source) -> Corpus:
    return source.corpus if isinstance(source, Mixture) else source


def _without(source: pipeline.Source, left_out: np.ndarray, files: DataFiles) -> pipeline.Source:
    if not isinstance(source, Mixture):
        return select(source, np.flatnonzero(~left_out))
    bounds = np.cumsum([0, *map(len, source.parts)])
    parts = []
    for path, part, begin, end in zip(
        files.train_paths, source.parts, bounds[:-1], bounds[1:], strict=True
    ):
        kept = np.flatnonzero(~left_out[begin:end])
        if not len(kept):
            raise ValueError(
                f"{path}: all of its proteins ({end - begin:,}) would be held out for validation: "
                "give --valid_fasta, or experiment.valid_fraction = 0"
            )
        parts.append(select(part, kept))
    return join_sources(parts, source.weights)
