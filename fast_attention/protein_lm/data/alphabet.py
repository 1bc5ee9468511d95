"""Alphabet: which tokens there are, in which order, and what each of them is.

Readers, packing, n-grams, mutations, sampling and reports ask the alphabet of a domain; no other
module knows a letter. `alphabets` has the alphabets that a configuration can name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, final, overload

import numpy as np

RESERVED_TOKEN = "|"
SPECIAL = ("bos", "eos", "pad", "mask")
"""Special tokens that a model or a batch may need."""

FASTA_SYMBOLS = "".join(
    chr(code) for code in range(33, 127) if not chr(code).islower() and chr(code) not in ">*"
)
"""What may stand for a residue in a FASTA file, whose readers take lower case for upper case. A
record begins with ``>``, and ``*`` is a stop codon."""


def _is_symbol(token: str) -> bool:
    return len(token) == 1 and token in FASTA_SYMBOLS


@final
@dataclasses.dataclass(frozen=True)
class Alphabet:
    """A finite ordered set of tokens; the id of a token is its position.

    Tokens that are named by none of the fields below are residues. Residues, rare letters and gaps
    are the ordinary tokens, of which sequences are made; the others are special.

    Attributes:
      tokens: All tokens in the order of their ids.
      rare: Letters that occur in sequences, but that no mutation and no corruption gives: rare
        residues, and letters that stand for one of several residues.
      gaps: Letters for gaps of aligned sequences.
      unknown: The letter for a residue that is not known; None where there is none.
      bos_token: The token before a sequence, or None.
      eos_token: The token after a sequence, or None.
      pad_token: The token that fills rows after the end, or None.
      mask_token: The token that hides a residue, or None.
      unused: Special tokens that have an id and no use here.
      longest: The length of the longest sequence that models read whole: a longer record is
        probably a mistake.
    """

    tokens: tuple[str, ...]
    rare: str = ""
    gaps: str = ""
    unknown: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    mask_token: str | None = None
    unused: tuple[str, ...] = ()
    longest: int = 50_000

    def __post_init__(self):
        """Checks that every token has one name and one meaning.

        Raises:
          ValueError: If a token occurs twice, is the reserved ``|``, has two meanings or is absent,
            or if there is no residue.
        """
        # A string is as good as a list of its letters.
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "unused", tuple(self.unused))
        repeated = sorted(name for name, number in Counter(self.tokens).items() if number > 1)
        if repeated:
            raise ValueError(
                f"Tokens must differ from each other and from the special tokens, but {repeated} "
                "occur more than once. Rename them, or pass another bos_token, eos_token, "
                "pad_token or mask_token."
            )
        if RESERVED_TOKEN in self.tokens:
            raise ValueError(
                f"Token {RESERVED_TOKEN!r} is reserved as the separator of written token lists; "
                "choose another name for it."
            )
        named = [*self.rare, *self.gaps, *self.unused]
        named += [token for token in map(self._special, SPECIAL) if token is not None]
        known = [*named, *([] if self.unknown is None else [self.unknown])]
        if len(set(named)) < len(named) or not set(known) <= set(self.tokens):
            raise ValueError(
                f"rare, gaps, unused and the special tokens must be different tokens of "
                f"{' '.join(self.tokens)}, and unknown one of them; got {known}"
            )
        if len(named) == len(self.tokens):
            raise ValueError("An alphabet needs at least one ordinary token that is a residue.")
        if self.longest < 1:
            raise ValueError(f"longest must be at least 1; got {self.longest}")

    def __len__(self) -> int:
        """Returns the number of tokens, special ones included."""
        return len(self.tokens)

    def _special(self, name: str) -> str | None:
        return getattr(self, f"{name}_token")

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: number for number, token in enumerate(self.tokens)}

    @property
    def bos(self) -> int | None:
        """Id of the begin token, or None."""
        return None if self.bos_token is None else self.ids[self.bos_token]

    @property
    def eos(self) -> int | None:
        """Id of the end token, or None."""
        return None if self.eos_token is None else self.ids[self.eos_token]

    @property
    def pad(self) -> int | None:
        """Id of the padding token, or None."""
        return None if self.pad_token is None else self.ids[self.pad_token]

    @property
    def mask(self) -> int | None:
        """Id of the mask token, or None."""
        return None if self.mask_token is None else self.ids[self.mask_token]

    @property
    def begin(self) -> int:
        """Id that begins the input of a causal model.

        Without a begin token it is a new id, ``len(alphabet)``, which is never a target: a model
        needs one more row of embeddings than the alphabet has tokens.
        """
        return len(self) if self.bos is None else self.bos

    @property
    def filler(self) -> int:
        """Id that fills rows: padding; failing that the end token; failing both 0."""
        return next((token for token in (self.pad, self.eos) if token is not None), 0)

    @property
    def token_ids(self) -> list[int]:
        """All ids, ``0 .. len - 1``."""
        return list(range(len(self)))

    @functools.cached_property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens, rising."""
        special = {*map(self._special, SPECIAL), *self.unused}
        return [number for number, token in enumerate(self.tokens) if token in special]

    @functools.cached_property
    def ordinary_ids(self) -> list[int]:
        """Ids of the tokens that are not special, rising."""
        special = set(self.special_ids)
        return [number for number in range(len(self)) if number not in special]

    @functools.cached_property
    def standard_ids(self) -> list[int]:
        """Ids of the residues, which a corrupted position may be replaced with."""
        others = {*self.rare, *self.gaps}
        return [number for number in self.ordinary_ids if self.tokens[number] not in others]

    @functools.cached_property
    def letters(self) -> dict[str, int]:
        """The ids of the ordinary tokens, by token."""
        return {self.tokens[number]: number for number in self.ordinary_ids}

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """int64 ``[V]``: the number of each ordinary token among these; -1 of special tokens."""
        ranks = np.full(len(self), -1, np.int64)
        ranks[self.ordinary_ids] = np.arange(len(self.ordinary_ids))
        return ranks

    @functools.cached_property
    def symbols(self) -> str:
        """The ordinary tokens that a FASTA file can hold, see `FASTA_SYMBOLS`."""
        return "".join(filter(_is_symbol, self.letters))

    @property
    def standard_symbols(self) -> str:
        """The tokens of `standard_ids` that a FASTA file can hold: what a substitution may give."""
        return "".join(filter(_is_symbol, (self.tokens[token] for token in self.standard_ids)))

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.min_scalar_type(len(self) - 1)

    def are_ordinary(self, values: Any) -> np.ndarray:
        """Returns a bool array, of the shape of ``values``, true at ids of ordinary tokens."""
        values = np.asarray(values)
        valid = self.are_valid(values)
        return valid & (self.ranks[np.where(valid, values, 0).astype(np.int64)] >= 0)

    def is_valid(self, value: Any) -> bool:
        """Returns whether ``value`` is the id of a token."""
        return bool(self.are_valid([value])[0])

    def are_valid(self, values: Any) -> np.ndarray:
        """Returns a bool array, of the shape of ``values``, True for those that are ids."""
        values = np.asarray(values)
        if values.dtype.kind not in "iuf":
            return np.zeros(values.shape, bool)
        return (values >= 0) & (values < len(self)) & (values == np.floor(values))

    def select(self, *, rare: bool = True, **special: bool) -> Alphabet:
        """The same alphabet without some tokens, the others numbered in the same order.

        Args:
          rare: Whether to keep the rare letters.
          **special: ``bos``, ``eos``, ``pad``, ``mask``: whether to keep that token.
        """
        absent = {f"{name}_token": None for name in SPECIAL if not special.get(name, True)}
        dropped = {self._special(name.removesuffix("_token")) for name in absent}
        if not rare:
            dropped |= set(self.rare)
        return dataclasses.replace(
            self,
            tokens=tuple(token for token in self.tokens if token not in dropped),
            rare=self.rare if rare else "",
            unknown=None if self.unknown in dropped else self.unknown,
            **absent,
        )

    def encode(self, tokens: str | bytes | Iterable[str]) -> list[int]:
        """Returns the ids of a string (one token a character), of bytes, or of several tokens.

        Raises:
          KeyError: at a token that is not in the alphabet; the message says which and where.
        """
        if isinstance(tokens, bytes):
            tokens = tokens.decode("utf-8")
        tokens = list(tokens)
        try:
            return [self.ids[token] for token in tokens]
        except KeyError:
            place = next(i for i, token in enumerate(tokens) if token not in self.ids)
            remedy = "" if self.unknown is None else f" ({self.unknown!r} is an unknown residue)"
            raise KeyError(
                f"Token {tokens[place]!r} at position {place} is not one of "
                f"{' '.join(self.tokens)}. Use upper case, and replace letters that the alphabet "
                "lacks"
                f"{remedy}."
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
          KeyError: at an id that is not in the alphabet.
          ValueError: if ``stop_at_eos`` is asked of an alphabet without an end token.
        """
        if stop_at_eos and self.eos is None:
            raise ValueError(
                "stop_at_eos=True needs an end token: build the alphabet with include_eos=True."
            )
        names = []
        for value in map(int, values):
            if stop_at_eos and value == self.eos:
                break
            if not 0 <= value < len(self):
                raise KeyError(f"Id {value} is not one of the {len(self)} token ids.")
            names.append(self.tokens[value])
        return "".join(names) if as_str else names
