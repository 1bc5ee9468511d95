"""The proteins of a run: those to train on, those to validate on, and what the two share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from fast_attention.protein_lm.data import held_out
from fast_attention.protein_lm.data.corpus import Corpus, load_corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.data.fasta import read_proteins
from fast_attention.protein_lm.data.mixture import Mixture, join_sources
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.evaluation.report import shared_note
from fast_attention.protein_lm.modeling import pipeline
from fast_attention.protein_lm.modeling.batches import select
from fast_attention.protein_lm.runs.data_record import SPLITS
from fast_attention.protein_lm.training.experiment import DataSettings
from fast_attention.protein_lm.wording import counted


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Proteins of a run, in memory.

    Attributes:
      files: Where they are.
      domain: Gives the vocabulary.
      train: To train on.
      valid: To validate on, or None.
      proteins: Number of proteins of each split.
      residues: Number of residues of each split.
      shared: By split, how many of its proteins are identical to one that is trained on.
      held_out: Numbers of the records of the training files that `valid` was made of, or None
        where these have files of their own.
      notes: Sentences that a user should read.
    """

    files: DataSettings
    domain: DiscreteDomain
    train: pipeline.Source
    valid: Corpus | None
    proteins: dict[str, int]
    residues: dict[str, int]
    shared: dict[str, int]
    held_out: np.ndarray | None
    notes: list[str]


def load_training_data(
    files: DataSettings,
    domain: DiscreteDomain,
    skipped: Mapping[str, SkippedRecords],
) -> TrainingData:
    """Reads the proteins of a run, those of the evaluation at the end included.

    Args:
      files: Where they are, see `experiment.choose_files`.
      domain: Gives the vocabulary.
      skipped: Takes the records that were left out, for ``train`` and ``valid``.

    Raises:
      FastaError: If a file cannot be read.
      ValueError: If holding out leaves nothing of a file.
    """
    on_error = files.on_error
    assert files.train_files is not None, "choose_files gives files to train on"
    train = pipeline.load_source(
        files.train_files, domain, on_error=on_error, skipped=skipped["train"]
    )
    hashes = held_out.sequence_hashes(_corpus(train))
    corpora: dict[str, Corpus] = {}
    shared: dict[str, int] = {}
    notes: list[str] = []
    valid = rows = None
    if files.holds_out:
        chosen = held_out.choose_held_out(hashes, files.valid_fraction)
        # One of each sequence gives the same result as all copies.
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
    elif files.valid_files is None and files.test_files is None:
        notes.append(f"there are no proteins to validate on: {_NO_FIGURES}")
    same_test = files.test_files == files.valid_files
    for split in ("valid", "test"):
        if files.by_split[split] is None or (split == "test" and same_test):
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
    if files.test_files is not None and same_test:
        corpora["test"] = corpora["valid"]
    splits = [split for split in SPLITS if split in corpora]
    return TrainingData(
        files,
        domain,
        train,
        valid,
        proteins={split: len(corpora[split]) for split in splits},
        residues={split: _residues(corpora[split]) for split in splits},
        shared=shared,
        held_out=rows,
        notes=notes,
    )


_NAMES = {"valid": "validation", "test": "test"}
_NO_FIGURES = "give --valid_fasta to see how good the model is"


def held_out_fasta(found: TrainingData) -> str:
    """The held-out proteins as the text of a FASTA file."""
    assert found.held_out is not None
    wanted = set(found.held_out.tolist())
    records = read_proteins(
        found.files.train_paths,
        alphabet=found.domain.vocab,
        on_error=found.files.on_error,
        skipped=SkippedRecords(),
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


def _without(source: pipeline.Source, left_out: np.ndarray, files: DataSettings) -> pipeline.Source:
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
