"""Alphabets made by the names and the parameters of Google's protein_lm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fast_attention.protein_lm.data.alphabet import RESERVED_TOKEN as RESERVED_TOKEN
from fast_attention.protein_lm.data.alphabet import SPECIAL, Alphabet
from fast_attention.protein_lm.data.alphabets.protein import (
    ALIGNMENT_TOKENS,
    ANOMALOUS_RESIDUES,
    STANDARD_RESIDUES,
)

_UNKNOWN = "X"


def Vocabulary(
    tokens: Iterable[Any] | int,
    include_bos: bool = False,
    include_eos: bool = False,
    include_pad: bool = False,
    include_mask: bool = False,
    bos_token: str = "<",
    eos_token: str = ">",
    pad_token: str = "_",
    mask_token: str = "*",
) -> Alphabet:
    """Returns the alphabet of some tokens, the special ones behind them.

    Args:
      tokens: the ordinary tokens, or how many there are (then named ``"0"``, ``"1"``, ...).
      include_bos: whether to append ``bos_token``, the begin of a sequence.
      include_eos: whether to append ``eos_token``, the end of a sequence.
      include_pad: whether to append ``pad_token``, which fills rows after the end.
      include_mask: whether to append ``mask_token``, which hides a residue.
      bos_token: name of the begin token; unused without ``include_bos``, and so on.
      eos_token: name of the end token.
      pad_token: name of the padding token.
      mask_token: name of the mask token.

    Raises:
      ValueError: if a token occurs twice, is the reserved ``|``, or there is none.
    """
    included = (include_bos, include_eos, include_pad, include_mask)
    names = (bos_token, eos_token, pad_token, mask_token)
    special: dict[str, Any] = {
        f"{name}_token": token
        for name, token, chosen in zip(SPECIAL, names, included, strict=True)
        if chosen
    }
    ordinary = [str(token) for token in (range(tokens) if isinstance(tokens, int) else tokens)]
    unknown = _UNKNOWN if _UNKNOWN in ordinary else None
    return Alphabet((*ordinary, *special.values()), unknown=unknown, **special)


def ProteinVocab(
    include_anomalous_amino_acids: bool = False,
    include_align_tokens: bool = False,
    **kwargs: Any,
) -> Alphabet:
    """Returns an alphabet of amino acids.

    Args:
      include_anomalous_amino_acids: whether to add ``BOUXZ`` to the 20 standard residues.
      include_align_tokens: whether to add the gaps ``.-`` of aligned sequences.
      **kwargs: ``include_bos`` and the other special tokens of ``Vocabulary``.
    """
    rare = ANOMALOUS_RESIDUES if include_anomalous_amino_acids else ""
    gaps = ALIGNMENT_TOKENS if include_align_tokens else ""
    plain = Vocabulary(STANDARD_RESIDUES + rare + gaps, **kwargs)
    return dataclasses.replace(plain, rare=rare, gaps=gaps)
