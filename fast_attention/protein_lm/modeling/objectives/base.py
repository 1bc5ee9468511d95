"""Objective: what a language model is trained for, and what it can be asked.

Letters: B batch, L row length, T tokens that a model reads, K answers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.packing import PackedRows
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.modeling.drawing import Drawing
from fast_attention.protein_lm.modeling.encoding import Encoded, with_end

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

Batch = dict[str, np.ndarray]


class Question(NamedTuple):
    """What a model is asked about a sequence.

    Attributes:
      inputs: int ``[T]``, the tokens that it reads.
      targets: int ``[K]``, tokens whose log-probabilities are computed.
      place: At which position of the inputs, where K is 1; None where K is T and each target is
        asked for at its own position.
    """

    inputs: np.ndarray
    targets: np.ndarray
    place: int | None = None


class Gapped(NamedTuple):
    """A sequence of which some spans are to be filled in.

    Attributes:
      known: Ids of the residues before, between and behind the spans: one array more than spans.
      bounds: The least and the most residues of each span.
    """

    known: tuple[np.ndarray, ...]
    bounds: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base class of objectives; options are its fields.

    Attributes:
      name: In configurations and run folders.
      causal: Whether the attention of the model is causal.
      begins: Whether the model reads a sequence behind a begin token and without its end token;
        otherwise it reads the end token and no begin token.
      enclose: Whether the model reads a sequence between a begin and an end token.
      corrupts: Whether batches depend on random numbers, and evaluations therefore on a seed.
      exact: Whether scores are log-likelihoods: every residue is predicted from those before it.
        Otherwise they are pseudo-log-likelihoods: every residue is predicted from all others.
      samples: Whether the model writes whole sequences.
      infills: Whether it fills in spans.
      rounds: Whether it fills in several positions at once, in rounds.
      methods: What it can say of mutations, see `mutation_effects`; the default first.
      sampling_options: Names of the options that ``sampling_kwargs`` of the model may have.
    """

    name: ClassVar[str]
    causal: ClassVar[bool] = False
    begins: ClassVar[bool] = False
    enclose = False
    corrupts: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    infills: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    methods: ClassVar[tuple[str, ...]] = ("pseudo-log-likelihood-ratio",)
    sampling_options: ClassVar[tuple[str, ...]] = ("temperature",)

    @property
    def num_sentinels(self) -> int:
        """Tokens that a model has behind those of the alphabet."""
        return 0

    @property
    def first(self) -> int:
        """Position of the first residue in what `read` returns."""
        return int(self.begins)

    def last(self, residues: Any) -> Any:
        """Position of the end token behind so many residues; of the last if it is not read."""
        return residues

    def check(self, alphabet: Alphabet) -> None:
        """Raises ValueError if the alphabet lacks a token that the objective needs."""

    def room(self, lengths: Any) -> Any:
        """How many tokens of a row sequences of so many tokens take, their end tokens included."""
        return lengths

    def batch(self, rows: PackedRows, alphabet: Alphabet, draws: np.ndarray) -> Batch:
        """Makes a batch as `pipeline.make_dataset` describes it.

        Args:
          rows: Packed sequences.
          alphabet: What their ids mean.
          draws: Uniform numbers in [0, 1), ``[2, B, L]``; ``[0, B, L]`` unless `corrupts`.
        """
        raise NotImplementedError

    def read(self, alphabet: Alphabet, item: Encoded) -> np.ndarray:
        """The tokens that a model reads of a sequence of which nothing is hidden."""
        return with_end(alphabet, item)

    def questions(self, alphabet: Alphabet, item: Encoded) -> Iterator[Question]:
        """What a model is asked to score a sequence; the answers are of its residues, in order."""
        raise NotImplementedError

    def describe(self, seeds: str) -> str:
        """A sentence on how batches are corrupted, given the words for the seeds."""
        raise NotImplementedError

    def check_spans(self, item: Gapped) -> None:
        """Raises ValueError if `fill` cannot fill in these spans."""

    def fill(
        self, model: BuiltModel, item: Gapped, keys: jax.Array, drawing: Drawing
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Fills in the spans of a sequence, once for each key.

        Args:
          model: With this objective.
          item: The sequence.
          keys: B random keys.
          drawing: How residues are drawn.

        Returns:
          B arrays, the ids of the residues of whole sequences, and float64 ``[B]``, the sums of the
          logarithms of the model's probabilities of the residues filled in, at temperature 1 and
          with nothing forbidden.

        Raises:
          RunError: If models with this objective do not fill in.
          ValueError: If the spans are not possible for this model.
        """
        raise RunError(f"{self.name} models cannot fill in residues")
