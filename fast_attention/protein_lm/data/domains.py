"""Domains: the valid sequences over a vocabulary, and their lengths.

Letters: N sequences, L maximum length.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.data import padding
from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.alphabets import get_alphabet
from fast_attention.protein_lm.data.vocabulary import Vocabulary


class DiscreteDomain:
    """Sequences of at most ``length`` tokens of ``vocab``."""

    def __init__(self, vocab: Alphabet, length: int):
        """Raises ValueError if ``length`` is not a positive whole number."""
        ranges.check("length", length, ranges.LENGTH)
        self._vocab = vocab
        self._length = length

    @property
    def vocab(self) -> Alphabet:
        """The alphabet."""
        return self._vocab

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self._vocab)

    @property
    def length(self) -> int:
        """The (maximum) number of tokens of a sequence."""
        return self._length

    def is_valid(self, sequence: Any) -> bool:
        """Returns whether ids ``[T]`` are a sequence in this domain."""
        raise NotImplementedError

    def are_valid(self, sequences: Iterable[Any]) -> np.ndarray:
        """Returns a bool array ``[N]``: which sequences are in this domain."""
        return np.array([self.is_valid(sequence) for sequence in sequences], bool)

    def _encode_each(self, sequences: Iterable[Any]) -> list[np.ndarray]:
        if isinstance(sequences, (str, bytes)):
            raise TypeError(
                "encode takes several sequences but got one string; write encode([sequence])."
            )
        encoded = [np.asarray(self._vocab.encode(sequence), np.int32) for sequence in sequences]
        for number, ids in enumerate(encoded):
            if len(ids) > self._length:
                raise ValueError(
                    f"Sequence {number} has {len(ids)} tokens, more than the {self._length} of "
                    "this domain. Crop it first, or raise the domain's length."
                )
        return encoded


class FixedLengthDiscreteDomain(DiscreteDomain):
    """All sequences of exactly ``length`` tokens."""

    def __init__(
        self,
        vocab_size: int | None = None,
        length: int | None = None,
        vocab: Alphabet | None = None,
    ):
        """Takes a vocabulary, or makes one of ``vocab_size`` numbered tokens.

        Raises:
          ValueError: unless exactly one of ``vocab_size`` and ``vocab``, and ``length``, is given.
        """
        if length is None:
            raise ValueError("length is required, but got None.")
        if vocab is None and vocab_size is not None:
            vocab = Vocabulary(vocab_size)
        elif vocab is None or vocab_size is not None:
            raise ValueError(
                "Give exactly one of vocab_size and vocab; got "
                f"vocab_size={vocab_size} and vocab={vocab}."
            )
        super().__init__(vocab, length)

    @property
    def size(self) -> int:
        """The exact number of sequences: ``vocab_size ** length``."""
        return self.vocab_size**self.length

    def is_valid(self, sequence: Any) -> bool:
        """Returns whether ids ``[T]`` are ``length`` ids of the vocabulary."""
        sequence = np.asarray(sequence)
        return sequence.shape == (self.length,) and bool(self.vocab.are_valid(sequence).all())

    def encode(self, sequences: Iterable[Any]) -> np.ndarray:
        """Returns the ids of some strings, int32 ``[N, length]``.

        Raises:
          KeyError: at a token that the vocabulary lacks.
          ValueError: at a sequence that is not ``length`` tokens long.
        """
        encoded = self._encode_each(sequences)
        for number, ids in enumerate(encoded):
            if len(ids) != self.length:
                raise ValueError(
                    f"Sequence {number} has {len(ids)} tokens, but sequences of this domain have "
                    f"{self.length}. Use VariableLengthDiscreteDomain for sequences that differ "
                    "in length."
                )
        return np.array(encoded, np.int32).reshape(-1, self.length)

    def decode(self, sequences: Iterable[Any], as_str: bool = True) -> list[Any]:
        """Returns the string (or token list) of each row of ids ``[N, length]``."""
        return [self.vocab.decode(row, as_str=as_str) for row in sequences]

    def sample_uniformly(self, num_samples: int, seed: int | None = None) -> np.ndarray:
        """Returns int32 ``[num_samples, length]``, uniform over the ordinary tokens."""
        generator = np.random.default_rng(seed)
        shape = (num_samples, self.length)
        return generator.choice(self.vocab.ordinary_ids, shape).astype(np.int32)

    def index_to_structure(self, index: int) -> np.ndarray:
        """Returns the ``index``-th sequence in lexicographic order, int32 ``[length]``.

        Raises:
          ValueError: unless ``0 <= index < size``.
        """
        if not 0 <= index < self.size:
            raise ValueError(f"index must be in 0 .. {self.size - 1}, but got {index}.")
        digits = np.zeros(self.length, np.int32)
        remaining = int(index)
        for place in reversed(range(self.length)):
            remaining, digits[place] = divmod(remaining, self.vocab_size)
        return digits

    def structure_to_index(self, structure: Any) -> int:
        """Returns the index of ids ``[length]`` in lexicographic order, an exact integer.

        Raises:
          ValueError: if the ids are not a sequence of this domain.
        """
        if not self.is_valid(structure):
            raise ValueError(
                f"Expected {self.length} ids below {self.vocab_size}, but got {structure}."
            )
        index = 0
        for digit in np.asarray(structure).tolist():
            index = index * self.vocab_size + int(digit)
        return index


class VariableLengthDiscreteDomain(DiscreteDomain):
    """All sequences of ``min_length`` to ``length`` tokens, followed by end tokens only."""

    def __init__(self, vocab: Alphabet, length: int, min_length: int = 0):
        """Raises ValueError if ``vocab`` has no end token, or no length is possible."""
        if vocab.eos is None:
            raise ValueError(
                "Sequences that differ in length need an end token: build the vocabulary with "
                "include_eos=True, or use FixedLengthDiscreteDomain."
            )
        super().__init__(vocab, length)
        if not 0 <= min_length <= length:
            raise ValueError(f"min_length must be in 0 .. {length}, but got {min_length}.")
        self._min_length = min_length
        self._eos = vocab.eos

    @property
    def min_length(self) -> int:
        """The minimum number of tokens, without the end token."""
        return self._min_length

    def is_valid(self, sequence: Any) -> bool:
        """Returns whether ids ``[T]``, end tokens dropped, are a sequence of this domain."""
        sequence = np.asarray(sequence)
        if sequence.ndim != 1:
            return False
        (content,) = padding.unpad_sequences([sequence], self._eos)
        return (
            self.min_length <= len(content) <= self.length
            and bool(self.vocab.are_valid(sequence).all())
            and bool(padding.sequences_end_with_value(sequence, self._eos))
        )

    def encode(self, sequences: Iterable[Any], pad: bool = True) -> Any:
        """Returns the ids of some strings, int32.

        Args:
          sequences: strings.
          pad: whether to pad with end tokens to ``length``, giving an array ``[N, length]``;
            otherwise the result is a list of N arrays.

        Raises:
          KeyError: at a token that the vocabulary lacks.
          ValueError: at a sequence of more than ``length`` tokens.
        """
        encoded = self._encode_each(sequences)
        return padding.pad_sequences(encoded, self.length, self._eos) if pad else encoded

    def decode(
        self, sequences: Iterable[Any], stop_at_eos: bool = True, as_str: bool = True
    ) -> list[Any]:
        """Returns the string (or token list) of each row of ids, by default up to its end token."""
        return [self.vocab.decode(row, stop_at_eos, as_str) for row in sequences]

    def sample_uniformly(
        self,
        num_samples: int,
        min_seq_len: int | None = None,
        max_seq_len: int | None = None,
        pad: bool = True,
        seed: int | None = None,
    ) -> Any:
        """Returns sequences of uniform length and uniform ordinary tokens, int32.

        Args:
          num_samples: N.
          min_seq_len: the minimum length; None uses ``min_length``.
          max_seq_len: the maximum length; None uses ``length``.
          pad: whether to pad with end tokens to ``length``, as in ``encode``.
          seed: random seed; None uses a new one in each call.

        Raises:
          ValueError: if no length of the domain is within the bounds.
        """
        low = self.min_length if min_seq_len is None else min_seq_len
        high = self.length if max_seq_len is None else max_seq_len
        if not self.min_length <= low <= high <= self.length:
            raise ValueError(
                f"Lengths {low} .. {high} are not within {self.min_length} .. {self.length}."
            )
        generator = np.random.default_rng(seed)
        samples = [
            generator.choice(self.vocab.ordinary_ids, length).astype(np.int32)
            for length in generator.integers(low, high + 1, num_samples)
        ]
        return padding.pad_sequences(samples, self.length, self._eos) if pad else samples


def make_protein_domain(
    include_anomalous_amino_acids: bool = True,
    include_bos: bool = True,
    include_eos: bool = True,
    include_pad: bool = True,
    include_mask: bool = True,
    length: int = 1024,
    alphabet: str = "protein",
) -> VariableLengthDiscreteDomain:
    """Returns the domain of the sequences of an alphabet.

    Args:
      include_anomalous_amino_acids: whether to keep the rare letters of the alphabet.
      include_bos: whether to keep its begin token.
      include_eos: whether to keep its end token.
      include_pad: whether to keep its padding token.
      include_mask: whether to keep its mask token.
      length: the maximum number of residues of a sequence.
      alphabet: the name of the alphabet, see `alphabets.ALPHABETS`.

    Raises:
      ValueError: if there is no such alphabet, or without ``include_eos``, because the end of a
        sequence would then be unknown.
    """
    vocab = get_alphabet(alphabet).select(
        rare=include_anomalous_amino_acids,
        bos=include_bos,
        eos=include_eos,
        pad=include_pad,
        mask=include_mask,
    )
    return VariableLengthDiscreteDomain(vocab, length)


def is_discrete(domain: Any) -> bool:
    """Returns whether ``domain`` consists of sequences of tokens."""
    return isinstance(domain, DiscreteDomain)


def check_if_discrete(domain: Any) -> None:
    """Raises ValueError unless ``domain`` consists of sequences of tokens."""
    if not is_discrete(domain):
        raise ValueError(
            "Expected a FixedLengthDiscreteDomain or a VariableLengthDiscreteDomain, but got "
            f"{type(domain).__name__}."
        )


def is_variable_length(domain: Any) -> bool:
    """Returns whether the sequences of ``domain`` may differ in length."""
    return isinstance(domain, VariableLengthDiscreteDomain)


def domain_to_bos(domain: DiscreteDomain) -> int:
    """Returns the id that begins every input, see `Alphabet.begin`."""
    return domain.vocab.begin
