"""Proteins in memory: one flat array of ids, cheap to slice, shuffle and crop.

Letters: N proteins, S stored tokens.
"""

from __future__ import annotations

import dataclasses
from array import array
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from fast_attention.protein_lm.domains import DiscreteDomain
from fast_attention.protein_lm.fasta_files import FastaPaths as FastaPaths
from fast_attention.protein_lm.fasta_files import fasta_paths, read_proteins
from fast_attention.protein_lm.skipped_records import SkippedRecords
from fast_attention.protein_lm.text_source import FastaError

BUNDLED_SPLITS = ("train", "valid", "test", "ood_test", "valid_iid", "test_iid", "tiny")

_DATA = Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Encoded proteins, each followed by one end token if the vocabulary has that.

    Attributes:
      tokens: uint8 ``[S]``, all proteins one after the other.
      offsets: int64 ``[N + 1]``; protein i is ``tokens[offsets[i] : offsets[i + 1]]``.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Returns the number of proteins."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[N]``: tokens of each protein, its end token included."""
        return np.diff(self.offsets)


def bundled_corpus(split: str) -> Path:
    """Returns the FASTA file of a split of the corpus that comes with the package.

    Args:
      split: One of `BUNDLED_SPLITS`. Proteins of ``"valid"``, ``"test"`` and ``"ood_test"`` have no
        relatives in ``"train"``, those of ``"valid_iid"`` and ``"test_iid"`` have; ``"tiny"`` is
        500 short proteins of ``"train"``.
    """
    if split not in BUNDLED_SPLITS:
        raise ValueError(f"split must be one of {', '.join(BUNDLED_SPLITS)}, but got {split!r}.")
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
    alphabet: str | None = None,
    ids: list[str] | None = None,
) -> Corpus:
    """Reads and encodes whole FASTA files; proteins keep their full length and their order.

    Args:
      fasta: one file or folder, or several, see `fasta_paths`. No pipes: training and evaluation
        read their files more than once.
      domain: gives the vocabulary; its length is not looked at.
      on_error: what to do with a record that cannot be read, see `read_proteins`.
      skipped: collects what ``on_error="skip"`` leaves out, which needs it.
      alphabet: the letters that a record may have; None takes `domain_letters` of ``domain``.
        Those of another domain leave out the same records as there.
      ids: takes the id of each protein.

    Raises:
      FastaError: if a file cannot be read or has a symbol that the vocabulary lacks.
      ValueError: if there is no file, or more tokens than a byte can tell apart.
    """
    paths = fasta_paths(fasta)
    for path in paths:
        if path.exists() and not path.is_file():
            raise FastaError(
                f"{path}: is a pipe or a device, but has to be read more than once. Write its "
                "content to a file first."
            )
    if domain.vocab_size > 255:
        raise ValueError(
            f"Proteins are kept as bytes, so that {domain.vocab_size} tokens are too many; at most "
            "255 are possible."
        )
    letters = domain_letters(domain)
    if alphabet is not None and not set(alphabet) <= set(letters):
        raise ValueError(f"alphabet must be some of the letters {letters}, but got {alphabet!r}.")
    table = bytes.maketrans(letters.encode(), bytes(domain.vocab.encode(letters)))
    end = b"" if domain.vocab.eos is None else bytes([domain.vocab.eos])
    tokens, offsets = bytearray(), array("q", [0])
    for record in read_proteins(
        paths, alphabet=alphabet or letters, on_error=on_error, skipped=skipped
    ):
        tokens += record.sequence.encode("ascii").translate(table) + end
        offsets.append(len(tokens))
        if ids is not None:
            ids.append(record.id)
    return Corpus(np.frombuffer(tokens, np.uint8), np.frombuffer(offsets, np.int64))


def domain_letters(domain: DiscreteDomain) -> str:
    """The letters that a protein of ``domain`` may have."""
    tokens = domain.vocab.tokens
    return "".join(tokens[i] for i in domain.vocab.ordinary_ids if tokens[i] in ascii_uppercase)
