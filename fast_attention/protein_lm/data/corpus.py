"""Proteins in memory: one flat array of ids, cheap to slice, shuffle and crop.

Letters: N proteins, S stored tokens.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.data.fasta import FastaPaths as FastaPaths
from fast_attention.protein_lm.data.fasta import fasta_paths, read_proteins
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.ranges import check_choice

BUNDLED_SPLITS = ("train", "valid", "test", "ood_test", "valid_iid", "test_iid", "tiny")

_DATA = Path(__file__).parent / "bundled"


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Encoded proteins, each followed by one end token if the vocabulary has that.

    Attributes:
      tokens: ``[S]`` of `Alphabet.id_dtype`, all proteins one after the other.
      offsets: int64 ``[N + 1]``; protein i is ``tokens[offsets[i] : offsets[i + 1]]``.
      vocab: what the ids mean.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    vocab: Alphabet

    def __len__(self) -> int:
        """Returns the number of proteins."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[N]``: tokens of each protein, its end token included."""
        return np.diff(self.offsets)


def join_rows(rows: Sequence[np.ndarray], vocab: Alphabet) -> Corpus:
    """The corpus of some proteins, each an array of ids.

    Args:
      rows: one array or more.
      vocab: what the ids mean.
    """
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Corpus(np.concatenate(rows).astype(vocab.id_dtype), offsets, vocab)


def bundled_corpus(split: str) -> Path:
    """Returns the FASTA file of a split of the corpus that comes with the package.

    Args:
      split: One of `BUNDLED_SPLITS`. Proteins of ``"valid"``, ``"test"`` and ``"ood_test"`` have no
        relatives in ``"train"``, those of ``"valid_iid"`` and ``"test_iid"`` have; ``"tiny"`` is
        500 short proteins of ``"train"``.
    """
    check_choice("split", split, BUNDLED_SPLITS)
    return _DATA / f"{split}.fasta.gz"


def bundled_splits() -> Path:
    """Returns the table of the split and the homology component of every bundled protein."""
    return _DATA / "splits.tsv.gz"


def load_corpus(
    fasta: FastaPaths,
    domain: DiscreteDomain,
    *,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
    ids: list[str] | None = None,
) -> Corpus:
    """Reads and encodes whole FASTA files; proteins keep their full length and their order.

    Args:
      fasta: one file or folder, or several, see `fasta_paths`; each is read once.
      domain: gives the vocabulary; its length is not looked at.
      on_error: what to do with a record that cannot be read, see `read_proteins`.
      skipped: collects what ``on_error="skip"`` leaves out, which needs it.
      ids: takes the id of each protein.

    Raises:
      FastaError: if a file cannot be read or has a symbol that the vocabulary lacks.
      ValueError: if there is no file, or the vocabulary has no token that a FASTA file can hold.
    """
    paths = fasta_paths(fasta)
    vocab = domain.vocab
    symbols = vocab.symbols
    if not symbols:
        raise ValueError(
            "A FASTA file has one symbol for each residue, but no ordinary token of the vocabulary "
            "is a single upper-case letter, digit or sign: give rows of ids instead."
        )
    table = np.zeros(128, vocab.id_dtype)
    table[np.frombuffer(symbols.encode("ascii"), np.uint8)] = vocab.encode(symbols)
    end = b"" if vocab.eos is None else np.array([vocab.eos], vocab.id_dtype).tobytes()
    tokens, offsets = bytearray(), array("q", [0])
    for record in read_proteins(paths, alphabet=vocab, on_error=on_error, skipped=skipped):
        tokens += table[np.frombuffer(record.sequence.encode("ascii"), np.uint8)].tobytes() + end
        offsets.append(len(tokens) // vocab.id_dtype.itemsize)
        if ids is not None:
            ids.append(record.id)
    return Corpus(
        np.frombuffer(tokens, vocab.id_dtype), np.frombuffer(offsets, np.int64), domain.vocab
    )
