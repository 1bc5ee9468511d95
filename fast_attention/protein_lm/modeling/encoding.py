"""From strings to the rows of ids that a model reads when it scores or embeds them.

What stands before and behind the residues is said by the objective of the model (`Objective.read`).

Letters: n residues of a sequence, B rows, T their length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.data.alphabet import Alphabet

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel


class Encoded(NamedTuple):
    """One sequence.

    Attributes:
      residues: int32 ``[n]``, the ids of its residues, without those beyond a crop.
      whole: Whether that is all of it.
    """

    residues: np.ndarray
    whole: bool


def longest_protein(model: BuiltModel) -> int | None:
    """Most residues of a protein that a model can read; None where its positions have no limit.

    Only learned positions end somewhere, after ``max_len`` residues. Others go on beyond the length
    of the domain, though the model has not been trained there.
    """
    return model.config.max_len if model.config.positions == "learned" else None


def longest_input(model: BuiltModel) -> int | None:
    """Most tokens that a model can read, all that its objective adds included, or None."""
    longest = longest_protein(model)
    return None if longest is None else int(model.objective.room(longest + 1))


def encode_sequences(
    model: BuiltModel,
    sequences: Iterable[str],
    *,
    max_length: int | None = None,
) -> Iterator[Encoded]:
    """Encodes sequences one by one.

    Args:
      model: Whose vocabulary they are encoded with.
      sequences: Residues, in upper case.
      max_length: Sequences are cropped to so many residues; None crops none.

    Yields:
      The sequences, in order.

    Raises:
      TypeError: If `sequences` is one string.
      ValueError: At a sequence that is empty, too long, or has a letter that is no residue of the
        vocabulary, or if `max_length` is less than 1.
    """
    if isinstance(sequences, str):
        raise TypeError("expected several sequences, but got one string: give [sequence].")
    if max_length is not None:
        ranges.check("max_length", max_length, ranges.LENGTH)
    return _encode(model, sequences, max_length)


def _encode(
    model: BuiltModel, sequences: Iterable[str], max_length: int | None
) -> Iterator[Encoded]:
    vocab, room = model.domain.vocab, longest_protein(model)
    letters = vocab.letters
    for number, sequence in enumerate(sequences):
        if not isinstance(sequence, str):
            raise TypeError(
                f"sequence {number} must be a string of residues, but is a "
                f"{type(sequence).__name__}: decode ids with the domain, or give them to logits()."
            )
        if not sequence:
            raise ValueError(f"sequence {number} is empty: leave it out.")
        part = sequence if max_length is None else sequence[:max_length]
        if room is not None and len(part) > room:
            raise ValueError(
                f"sequence {number} has {len(part)} residues, but the model's learned positions "
                f"have room for {room}: give max_length={room} to use the first {room} of them, "
                "or train a model with positions='rotary'."
            )
        try:
            ids = np.array([letters[letter] for letter in part], np.int32)
        except KeyError as error:
            unknown = f", and {vocab.unknown!r} for an unknown residue" if vocab.unknown else ""
            raise ValueError(
                f"sequence {number} has {error.args[0]!r}, which is none of the residues "
                f"{''.join(letters)}: use upper case{unknown}."
            ) from None
        yield Encoded(ids, len(part) == len(sequence))


def with_end(alphabet: Alphabet, item: Encoded) -> np.ndarray:
    """Returns residues and the end token, if the alphabet has one.

    A cropped sequence does not end where it was cropped.
    """
    eos = alphabet.eos
    return np.append(item.residues, eos) if item.whole and eos is not None else item.residues


def row_lengths(rows: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Returns int32 ``[number]``, the lengths of some rows, and 0 for those that are missing."""
    return np.array([len(row) for row in rows] + [0] * (number - len(rows)), np.int32)


def number_rows(tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns positions and key mask ``[B, T]`` of rows that hold `lengths` tokens each."""
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    visible = place < lengths[:, None]
    # Padding may reach beyond the last learned position.
    return jnp.where(visible, place, 0), visible
