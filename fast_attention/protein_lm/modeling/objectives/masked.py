"""Masked language model: predict masked residues from both sides (arXiv:1810.04805).

Letters: B rows, L row length, T length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.models import samplers
from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.packing import PackedRows
from fast_attention.protein_lm.modeling.drawing import Drawing, draw_tokens
from fast_attention.protein_lm.modeling.encoding import Encoded, longest_input, with_end
from fast_attention.protein_lm.modeling.objectives.base import Batch, Gapped, Objective, Question

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

# Rows are padded to a multiple of it, so that few programs are compiled.
_STRIDE = 32


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """Targets ``x1 .. xn EOS``; inputs the same with some residues corrupted; weights at these.

    The defaults are those of BERT (section 3.1).

    Attributes:
      mask_rate: share of the residues that are chosen for prediction.
      mask_token_proportion: share of the chosen residues that are replaced by the mask token.
      random_token_proportion: share of the chosen residues that are replaced by a random standard
        residue (possibly the same one). The other chosen residues are unchanged.
      enclose: sequences are read between a begin and an end token, as ESM-2 and BERT do.
    """

    mask_rate: float = 0.15
    mask_token_proportion: float = 0.8
    random_token_proportion: float = 0.1
    enclose: bool = False

    name = "masked"
    rounds = True
    methods = ("masked-marginals", "wt-marginals", "pseudo-log-likelihood-ratio")

    def __post_init__(self):
        """Raises ValueError if a share, or the sum of the two proportions, is not in [0, 1]."""
        shares = dataclasses.asdict(self)
        del shares["enclose"]
        shares["mask_token_proportion + random_token_proportion"] = (
            self.mask_token_proportion + self.random_token_proportion
        )
        for name, share in shares.items():
            if not 0 <= share <= 1 + 1e-9:
                raise ValueError(f"{name} must be in [0, 1], but is {share}.")

    @property
    def first(self) -> int:
        """The first residue is behind the begin token, if that is read."""
        return int(self.enclose)

    def last(self, residues: Any) -> Any:
        """The position of the end token."""
        return residues + self.first

    def room(self, lengths: Any) -> Any:
        """The begin token, if it is read, takes one."""
        return lengths + self.first

    def read(self, alphabet: Alphabet, item: Encoded) -> np.ndarray:
        """The residues and the end token, behind the begin token with `enclose`."""
        tokens = with_end(alphabet, item)
        return np.insert(tokens, 0, alphabet.begin) if self.enclose else tokens

    def check(self, alphabet: Alphabet) -> None:
        """Raises ValueError if a token is missing."""
        if self.enclose and (alphabet.bos is None or alphabet.eos is None):
            raise ValueError(
                "enclose=True reads a begin and an end token: make the domain with "
                "include_bos=True and include_eos=True"
            )
        if alphabet.mask is None:
            raise ValueError(
                "a masked model needs a mask token: make the domain with include_mask=True"
            )

    def batch(self, rows: PackedRows, alphabet: Alphabet, draws: np.ndarray) -> Batch:
        """Corrupts residues, see `mask_tokens`."""
        rows = _enclosed(rows, alphabet) if self.enclose else rows
        inputs, chosen = mask_tokens(rows.tokens, rows.segment_ids, alphabet, draws, self)
        return {
            "inputs": inputs,
            "targets": rows.tokens,
            "weights": chosen.astype(np.float32),
            "segment_ids": rows.segment_ids,
            "positions": rows.positions,
        }

    def questions(self, alphabet: Alphabet, item: Encoded) -> Iterator[Question]:
        """Each residue, hidden alone."""
        tokens = self.read(alphabet, item)
        for place, token in enumerate(item.residues, self.first):
            inputs = tokens.copy()
            inputs[place] = alphabet.mask
            yield Question(inputs, np.array([token]), place)

    def describe(self, seeds: str) -> str:
        """The shares of the corruption."""
        shown = 1 - self.mask_token_proportion - self.random_token_proportion
        return (
            f"{100 * self.mask_rate:g} % of the residues are asked for, chosen by {seeds}; of "
            f"these {100 * self.mask_token_proportion:g} % are hidden, "
            f"{100 * self.random_token_proportion:g} % are replaced by a random residue, and "
            f"{100 * shown:g} % are left as they are"
        )

    def check_spans(self, item: Gapped) -> None:
        """Raises ValueError at a span whose length is not known."""
        for low, high in item.bounds:
            if low != high:
                raise ValueError(
                    f"the span [{low}-{high}] has no single length, which a masked model needs: "
                    f"write [{high}], or take a run with the objective span_corruption"
                )

    def fill(
        self, model: BuiltModel, item: Gapped, keys: jax.Array, drawing: Drawing
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Fills in the positions that the model is surest of, then those that remain, and so on.

        In every round the model sees all that is known, the positions it is surest of (where its
        most probable residue is the most probable) are filled in, and the others stay hidden. The
        positions are divided evenly among ``drawing.rounds``; with one position a round no two
        residues are drawn without sight of each other. Special tokens are never drawn.
        """
        alphabet = model.domain.vocab
        pieces = [item.known[0]]
        for (length, _), known in zip(item.bounds, item.known[1:], strict=True):
            pieces += [np.full(length, alphabet.mask), known]
        residues = np.concatenate(pieces).astype(np.int32)
        tokens = self.read(alphabet, Encoded(residues, whole=True))
        width = -(-len(tokens) // _STRIDE) * _STRIDE
        missing = min(width, longest_input(model) or width) - len(tokens)
        pad = alphabet.eos if alphabet.pad is None else alphabet.pad
        if pad is not None:
            tokens = np.append(tokens, np.full(missing, pad, np.int32))
        count = int((residues == alphabet.mask).sum())
        rounds = min(count, drawing.rounds or count)
        rows = np.tile(tokens, (len(keys), 1))
        hidden, total = rows == alphabet.mask, np.zeros(len(rows))
        for step in range(rounds):
            number = (step + 1) * count // rounds - step * count // rounds
            found = _fill_in(
                model.logits(unpacked(rows, alphabet)),
                jnp.asarray(rows),
                jnp.asarray(hidden),
                jnp.asarray(number, jnp.int32),
                jax.vmap(jax.random.fold_in, (0, None))(keys, step),
                jnp.asarray(drawing.temperature, jnp.float32),
                jnp.asarray(1.0 if drawing.top_p is None else drawing.top_p, jnp.float32),
                top_k=drawing.top_k,
                never=model.tokens.special,
            )
            rows, hidden = np.asarray(found.tokens), np.asarray(found.hidden)
            total += np.asarray(found.log_probability, np.float64)
        return list(rows[:, self.first : self.first + len(residues)]), total


def unpacked(ids: np.ndarray, alphabet: Alphabet) -> Batch:
    """The batch of rows that hold one sequence each, for scoring.

    Args:
      ids: int [N, T]; a row ends at its first end token, or before its first padding token.
      alphabet: Says which those are.
    """
    before = np.cumsum(ids == alphabet.eos, axis=1) - (ids == alphabet.eos)
    visible = (before == 0) & (ids != alphabet.pad)
    return {
        "inputs": ids,
        "targets": ids,
        "weights": visible.astype(np.float32),
        "segment_ids": visible.astype(np.int32),
        "positions": np.where(visible, np.arange(ids.shape[1])[None], 0).astype(np.int32),
    }


def _enclosed(rows: PackedRows, alphabet: Alphabet) -> PackedRows:
    """Begins every sequence with the begin token; the padding of the rows leaves the room."""
    assert alphabet.bos is not None
    visible = rows.segment_ids > 0
    row, column = np.nonzero(visible)
    segments = rows.segment_ids[visible]
    moved = column + segments
    tokens = np.full_like(rows.tokens, alphabet.filler)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    tokens[row, moved], segment_ids[row, moved] = rows.tokens[visible], segments
    positions[row, moved] = rows.positions[visible] + 1
    begins = rows.positions[visible] == 0
    tokens[row[begins], moved[begins] - 1] = alphabet.bos
    segment_ids[row[begins], moved[begins] - 1] = segments[begins]
    return PackedRows(tokens, segment_ids, positions)


def mask_tokens(
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    vocab: Alphabet,
    draws: np.ndarray,
    config: Masked,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts residues, and returns which.

    A residue is chosen when its first draw is below ``mask_rate``. Special tokens never are; but
    of every protein at least one residue is: failing others, that of the lowest draw. The second
    draw says what becomes of a chosen residue: mask token, random residue, or nothing.

    Args:
      tokens: int ``[B, L]``.
      segment_ids: int ``[B, L]``, equal within a protein, 0 at padding.
      vocab: says which tokens are special, and has a mask token.
      draws: uniform numbers in [0, 1), ``[2, B, L]``; equal draws give equal corruption.
      config: the shares.

    Returns:
      Corrupted tokens int32 ``[B, L]`` and the chosen positions bool ``[B, L]``.

    Raises:
      ValueError: if the vocabulary has no mask token.
    """
    config.check(vocab)
    assert vocab.mask is not None  # As was checked.
    choice, fate = draws
    maskable = (segment_ids > 0) & vocab.are_ordinary(tokens)

    protein = segment_ids + (segment_ids.max() + 1) * np.arange(len(tokens))[:, None]
    lowest = np.full(protein.max() + 1, np.inf)
    np.minimum.at(lowest, protein[maskable], choice[maskable])
    chosen = maskable & ((choice < config.mask_rate) | (choice == lowest[protein]))

    hidden = chosen & (fate < config.mask_token_proportion)
    until = config.mask_token_proportion + config.random_token_proportion
    replaced = chosen & ~hidden & (fate < until)
    # Within its interval the second draw is uniform again: it also picks the residue.
    residues = np.asarray(vocab.standard_ids, np.int32)
    share = (fate[replaced] - config.mask_token_proportion) / config.random_token_proportion
    picked = np.minimum((share * len(residues)).astype(np.int64), len(residues) - 1)

    inputs = tokens.astype(np.int32)
    inputs[hidden] = vocab.mask
    inputs[replaced] = residues[picked]
    return inputs, chosen


class _Draw(NamedTuple):
    """Results of one round.

    Attributes:
      tokens: ``[B, T]``, with some of the hidden positions filled in.
      hidden: ``[B, T]``, those that remain.
      log_probability: ``[B]``, that of the residues filled in.
    """

    tokens: Array
    hidden: Array
    log_probability: Array


@functools.partial(jax.jit, static_argnames=("top_k", "never"))
def _fill_in(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    hidden: Bool[Array, "B T"],
    number: Int[Array, ""],
    keys: Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    top_k: int | None,
    never: tuple[int, ...],
) -> _Draw:
    """Fills in the `number` hidden positions of each row of which the model is surest."""
    allowed = samplers.forbid_tokens(logits, never)
    sureness = jnp.where(hidden, jax.nn.log_softmax(allowed).max(-1), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-sureness, axis=1), axis=1)
    now = hidden & (rank < number)
    drawn = draw_tokens(keys, allowed, temperature, top_p, top_k)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
    return _Draw(
        jnp.where(now, drawn, tokens), hidden & ~now, jnp.sum(jnp.where(now, chosen, 0.0), axis=1)
    )
