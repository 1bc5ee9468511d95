"""Proteins in memory: one flat array of ids, cheap to slice, shuffle and crop.

Letters: N proteins, S stored tokens.
"""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from fast_attention.protein_lm.domains import DiscreteDomain
from fast_attention.protein_lm.fasta import read_fasta

BUNDLED_SPLITS = ("train", "valid", "test", "tiny")

FastaPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


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
      split: ``"train"``, ``"valid"``, ``"test"``, or ``"tiny"`` (500 short proteins of ``train``).
    """
    if split not in BUNDLED_SPLITS:
        raise ValueError(f"split must be one of {', '.join(BUNDLED_SPLITS)}, but got {split!r}.")
    return Path(__file__).parent / "data" / f"{split}.fasta.gz"


def load_corpus(
    fasta: FastaPaths,
    domain: DiscreteDomain,
    *,
    on_error: str = "raise",
) -> Corpus:
    """Reads and encodes whole FASTA files; proteins keep their full length and their order.

    Args:
      fasta: one file, or several that are read one after the other.
      domain: gives the vocabulary; its length is not looked at.
      on_error: ``"replace"`` reads letters that the vocabulary lacks as ``X``.

    Raises:
      FastaError: if a file cannot be read or has a symbol that the vocabulary lacks.
      ValueError: if there is no file, or more tokens than a byte can tell apart.
    """
    paths = [fasta] if isinstance(fasta, (str, os.PathLike)) else list(fasta)
    if not paths:
        raise ValueError("Expected at least one FASTA file, but got an empty list.")
    table, alphabet = _byte_table(domain)
    end = b"" if domain.vocab.eos is None else bytes([domain.vocab.eos])
    tokens, lengths = bytearray(), array("q", [0])
    for path in paths:
        for record in read_fasta(path, alphabet=alphabet, on_error=on_error):
            tokens += record.sequence.encode("ascii").translate(table) + end
            lengths.append(len(record.sequence) + len(end))
    return Corpus(np.frombuffer(tokens, np.uint8), np.cumsum(lengths, dtype=np.int64))


def _byte_table(domain: DiscreteDomain) -> tuple[bytes, str]:
    if domain.vocab_size > 255:
        raise ValueError(
            f"Proteins are kept as bytes, so that {domain.vocab_size} tokens are too many; at most "
            "255 are possible."
        )
    tokens = domain.vocab.tokens
    letters = {tokens[i]: i for i in domain.vocab.ordinary_ids if tokens[i] in ascii_uppercase}
    table = bytearray(256)
    for letter, number in letters.items():
        table[ord(letter)] = number
    return bytes(table), "".join(letters)
