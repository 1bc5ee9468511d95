"""Vocabularies: which tokens there are, in which order, and which of them are special.

Ids are positions: the given tokens first, then those special tokens that were asked for, in the
order begin, end, padding, mask. The ids of the full protein vocabulary are therefore
``ACDEFGHIKLMNPQRSTVWY`` 0-19, ``BOUXZ`` 20-24, ``<`` 25, ``>`` 26, ``_`` 27, ``*`` 28.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
ANOMALOUS_RESIDUES = "BOUXZ"
ALIGNMENT_TOKENS = ".-"
RESERVED_TOKEN = "|"
FASTA_SYMBOLS = "".join(
    chr(code) for code in range(33, 127) if not chr(code).islower() and chr(code) not in ">*"
)
"""What may stand for a residue in a FASTA file, whose readers take lower case for upper case. A
record begins with ``>``, and ``*`` is a stop codon."""


def _is_symbol(token: str) -> bool:
    return len(token) == 1 and token in FASTA_SYMBOLS


class Vocabulary:
    """A finite ordered set of tokens, some of which may be special."""

    def __init__(
        self,
        tokens: Iterable[Any] | int,
        include_bos: bool = False,
        include_eos: bool = False,
        include_pad: bool = False,
        include_mask: bool = False,
        bos_token: str = "<",
        eos_token: str = ">",
        pad_token: str = "_",
        mask_token: str = "*",
    ):
        """Numbers the tokens.

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
        ordinary = [str(token) for token in (range(tokens) if isinstance(tokens, int) else tokens)]
        special = [
            (include_bos, bos_token),
            (include_eos, eos_token),
            (include_pad, pad_token),
            (include_mask, mask_token),
        ]
        names = ordinary + [name for included, name in special if included]
        repeated = sorted(name for name, number in Counter(names).items() if number > 1)
        if repeated:
            raise ValueError(
                f"Tokens must differ from each other and from the special tokens, but {repeated} "
                "occur more than once. Rename them, or pass another bos_token, eos_token, "
                "pad_token or mask_token."
            )
        if RESERVED_TOKEN in names:
            raise ValueError(
                f"Token {RESERVED_TOKEN!r} is reserved as the separator of written token lists; "
                "choose another name for it."
            )
        if not ordinary:
            raise ValueError("A vocabulary needs at least one ordinary token, but got none.")
        self._tokens = tuple(names)
        self._ids = {name: number for number, name in enumerate(names)}
        self._num_ordinary = len(ordinary)
        self._bos, self._eos, self._pad, self._mask = (
            self._ids[name] if included else None for included, name in special
        )

    def __len__(self) -> int:
        """Returns the number of tokens, special ones included."""
        return len(self._tokens)

    def __repr__(self) -> str:
        """Returns the tokens in the order of their ids."""
        return f"{type(self).__name__}({'|'.join(self._tokens)})"

    @property
    def tokens(self) -> list[str]:
        """All tokens in the order of their ids."""
        return list(self._tokens)

    @property
    def token_ids(self) -> list[int]:
        """All ids, ``0 .. len - 1``."""
        return list(range(len(self._tokens)))

    @property
    def ordinary_ids(self) -> list[int]:
        """Ids of the tokens that are not special."""
        return list(range(self._num_ordinary))

    def are_ordinary(self, values: Any) -> np.ndarray:
        """Returns a bool array, of the shape of ``values``, true at ids of ordinary tokens."""
        return self.are_valid(values) & (np.asarray(values) < self._num_ordinary)

    @property
    def symbols(self) -> str:
        """The ordinary tokens that a FASTA file can hold, see `FASTA_SYMBOLS`."""
        return "".join(token for token in self._tokens[: self._num_ordinary] if _is_symbol(token))

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.min_scalar_type(len(self._tokens) - 1)

    @property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens present, in the order begin, end, padding, mask."""
        return list(range(self._num_ordinary, len(self._tokens)))

    @property
    def standard_ids(self) -> list[int]:
        """Ids a corrupted position may be replaced with: here all ordinary ones."""
        return self.ordinary_ids

    @property
    def standard_symbols(self) -> str:
        """The tokens of `standard_ids` that a FASTA file can hold: what a substitution may give."""
        return "".join(filter(_is_symbol, (self._tokens[token] for token in self.standard_ids)))

    @property
    def bos(self) -> int | None:
        """Id of the begin token, or None."""
        return self._bos

    @property
    def eos(self) -> int | None:
        """Id of the end token, or None."""
        return self._eos

    @property
    def pad(self) -> int | None:
        """Id of the padding token, or None."""
        return self._pad

    @property
    def mask(self) -> int | None:
        """Id of the mask token, or None."""
        return self._mask

    def is_valid(self, value: Any) -> bool:
        """Returns whether ``value`` is the id of a token."""
        return bool(self.are_valid([value])[0])

    def are_valid(self, values: Any) -> np.ndarray:
        """Returns a bool array, of the shape of ``values``, telling which of them are ids."""
        values = np.asarray(values)
        if values.dtype.kind not in "iuf":
            return np.zeros(values.shape, bool)
        return (values >= 0) & (values < len(self)) & (values == np.floor(values))

    def encode(self, tokens: str | bytes | Iterable[str]) -> list[int]:
        """Returns the ids of a string (one token a character), of bytes, or of several tokens.

        Raises:
          KeyError: at a token that is not in the vocabulary; the message says which and where.
        """
        if isinstance(tokens, bytes):
            tokens = tokens.decode("utf-8")
        tokens = list(tokens)
        try:
            return [self._ids[token] for token in tokens]
        except KeyError:
            unknown = next(i for i, token in enumerate(tokens) if token not in self._ids)
            raise KeyError(
                f"Token {tokens[unknown]!r} at position {unknown} is not one of "
                f"{' '.join(self._tokens)}. Use upper case, and replace what the vocabulary lacks "
                "(for proteins usually by 'X')."
            ) from None

    @overload
    def decode(
        self, values: Iterable[Any], stop_at_eos: bool = False, as_str: Literal[True] = True
    ) -> str: ...

    @overload
    def decode(
        self, values: Iterable[Any], stop_at_eos: bool = False, as_str: bool = True
    ) -> str | list[str]: ...

    def decode(
        self, values: Iterable[Any], stop_at_eos: bool = False, as_str: bool = True
    ) -> str | list[str]:
        """Returns the tokens of some ids, joined to one string unless ``as_str`` is False.

        Args:
          values: ids, ``[T]``.
          stop_at_eos: whether to leave out the first end token and what follows it.
          as_str: whether to join the tokens.

        Raises:
          KeyError: at an id that is not in the vocabulary.
          ValueError: if ``stop_at_eos`` is asked of a vocabulary without an end token.
        """
        if stop_at_eos and self._eos is None:
            raise ValueError(
                "stop_at_eos=True needs an end token: build the vocabulary with include_eos=True."
            )
        names = []
        for value in map(int, values):
            if stop_at_eos and value == self._eos:
                break
            if not 0 <= value < len(self._tokens):
                raise KeyError(f"Id {value} is not one of the {len(self._tokens)} token ids.")
            names.append(self._tokens[value])
        return "".join(names) if as_str else names


class ProteinVocab(Vocabulary):
    """Amino acids, one letter each."""

    def __init__(
        self,
        include_anomalous_amino_acids: bool = False,
        include_align_tokens: bool = False,
        **kwargs: Any,
    ):
        """Numbers the standard residues, then the others that are asked for.

        Args:
          include_anomalous_amino_acids: whether to add ``BOUXZ`` to the 20 standard residues.
          include_align_tokens: whether to add the gaps ``.-`` of aligned sequences.
          **kwargs: ``include_bos`` and the other special tokens of ``Vocabulary``.
        """
        anomalous: Sequence[str] = ANOMALOUS_RESIDUES if include_anomalous_amino_acids else ""
        alignment: Sequence[str] = ALIGNMENT_TOKENS if include_align_tokens else ""
        super().__init__([*STANDARD_RESIDUES, *anomalous, *alignment], **kwargs)

    @property
    def standard_ids(self) -> list[int]:
        """Ids of the 20 standard residues."""
        return list(range(len(STANDARD_RESIDUES)))
