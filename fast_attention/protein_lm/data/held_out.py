"""Proteins held out of a corpus by the hash of their sequence; proteins that two corpora share.

Shape letters: N proteins.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus

MOST = 1000
"""Most sequences that are held out."""


def sequence_hashes(corpus: Corpus) -> np.ndarray:
    """A number for each protein, equal for equal sequences, uint64 ``[N]``.

    It is a hash of the letters: other proteins, their order, and the vocabulary do not change it.

    Args:
      corpus: N proteins.
    """
    letters = np.array(
        [ord(token) if len(token) == 1 else 0 for token in corpus.vocab.tokens], "<u4"
    )
    ends = corpus.offsets[1:] - (corpus.vocab.eos is not None)
    found = bytearray()
    for begin, end in zip(corpus.offsets[:-1].tolist(), ends.tolist(), strict=True):
        text = letters[corpus.tokens[begin:end]].tobytes()
        found += hashlib.blake2b(text, digest_size=8).digest()
    return np.frombuffer(found, "<u8")


def choose_held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Chooses what to hold out: the sequences whose hash is below a share of all possible hashes.

    All copies of a sequence are on one side. A protein stays on its side when others are added,
    as long as fewer than `MOST` are held out: beyond that those of the lowest hashes are.
    At least one sequence is held out, and at least one is not.

    Args:
      hashes: From `sequence_hashes`, uint64 ``[N]``.
      fraction: Of the sequences, above 0 and below 1.

    Returns:
      Whether each protein is held out, bool ``[N]``; none where all sequences are equal.
    """
    different = np.unique(hashes)
    chosen = different[different < np.uint64(fraction * 2.0**64)][:MOST]
    chosen = (chosen if len(chosen) else different[:1])[: len(different) - 1]
    return np.isin(hashes, chosen)
