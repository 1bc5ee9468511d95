"""Filling in hidden residues of proteins with a masked model.

Shape letters: B batch, T length, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.models import samplers
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.sampling import row_keys
from fast_attention.protein_lm.modeling import batches
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.encoding import longest_input, longest_protein
from fast_attention.protein_lm.modeling.token_batches import TOKENS_PER_BATCH

HIDDEN = "*"
_ROWS_AT_ONCE = 16
# Rows are padded to a multiple of it, so that few programs are compiled.
_STRIDE = 32


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


def infill_proteins(
    model: BuiltModel,
    proteins: Iterable[FastaRecord],
    *,
    num_samples: int = 1,
    rounds: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[FastaRecord]:
    """Fills in the hidden residues of proteins, drawing each from the model.

    In every round the model sees all that is known, the positions it is surest of (where its most
    probable residue is the most probable) are filled in, and the others stay hidden. With one
    position a round no two residues are drawn without sight of each other. Special tokens are
    never drawn.

    Args:
      model: A `FlaxBERT`.
      proteins: With ``*`` for each hidden residue.
      num_samples: How often each protein is filled in.
      rounds: Among which the positions of a protein are divided evenly; None takes one round for
        each position, and so do more rounds than positions.
      temperature: Divides the logits; 0 takes the most probable residue. None is that of the
        model's ``sampling_kwargs``, or 1.
      top_k: Draw among so many most probable residues.
      top_p: Draw among the fewest residues that together have this probability.
      seed: Of the draw. Sample i of a protein depends on `seed` and i, and not on the others.

    Returns:
      For every protein `num_samples` records, whose ids are its own and a number. The description
      has ``fill_log_probability`` (the sum over the filled positions of the natural logarithm of
      the model's probability of the residue, in the round it was drawn in, at temperature 1 and
      with nothing forbidden), ``filled``, ``residues``, ``rounds`` and ``seed``.

    Raises:
      RunError: If the model is not a masked one.
      ValueError: If a protein hides nothing, has a letter that the vocabulary lacks or more
        residues than the model takes, or an argument is out of its range.
    """
    if model.objective != "masked":
        raise RunError(
            f"{type(model).__name__} sees only what stands before a residue and cannot fill in "
            "hidden ones: use a run of FlaxBERT, or give the beginning of a protein as a prompt"
        )
    for option, value, least in (("num_samples", num_samples, 1), ("rounds", rounds, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}; got {value}")
    if temperature is None:
        temperature = float(model.sampling_kwargs.get("temperature", 1.0))
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more; got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is the probability to keep, in (0, 1]; got {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all residues; got {top_k}")
    options = _Options(temperature, top_k, top_p, model.tokens.special)
    encoded = [(protein, _encode(model, protein)) for protein in proteins]
    return _fill(model, encoded, num_samples, rounds, seed, options)


class _Options(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float | None
    never: tuple[int, ...]


def _fill(
    model: BuiltModel,
    proteins: list[tuple[FastaRecord, np.ndarray]],
    num_samples: int,
    rounds: int | None,
    seed: int,
    options: _Options,
) -> Iterator[FastaRecord]:
    vocab = model.domain.vocab
    for protein, ids in proteins:
        count = int((ids == vocab.mask).sum())
        steps = min(count, rounds or count)
        size = max(1, min(num_samples, _ROWS_AT_ONCE, TOKENS_PER_BATCH // len(ids)))
        for first in range(0, num_samples, size):
            keys = row_keys(seed, first, size)
            rows, values = _fill_rows(model, np.tile(ids, (size, 1)), steps, keys, options)
            for row in range(min(size, num_samples - first)):
                yield FastaRecord(
                    f"{protein.id}_{first + row + 1}",
                    f"fill_log_probability={values[row]:.4f} filled={count} "
                    f"residues={len(protein.sequence)} rounds={steps} seed={seed}",
                    vocab.decode(rows[row, : len(protein.sequence)]),
                )


def _encode(model: BuiltModel, protein: FastaRecord) -> np.ndarray:
    """The ids of a protein, its end token, and padding to one of few widths."""
    vocab, room = model.domain.vocab, longest_protein(model)
    letters = protein.sequence.upper()
    known = letters.replace(HIDDEN, "")
    if known == letters:
        raise ValueError(
            f"protein {protein.id!r} has no hidden residue: write {HIDDEN} for each one"
        )
    if room is not None and len(letters) > room:
        raise ValueError(
            f"protein {protein.id!r} has {len(letters)} residues, but the model's learned "
            f"positions have room for {room}: cut it, or train a model with positions='rotary'"
        )
    try:
        vocab.encode(known)
        if not set(known) <= vocab.letters.keys():
            raise KeyError("it has a symbol that is no residue.")
    except KeyError as error:
        raise ValueError(f"protein {protein.id!r}: {error.args[0]}") from None
    mask = vocab.tokens[vocab.mask or 0]
    ids = vocab.encode([mask if letter == HIDDEN else letter for letter in letters])
    if vocab.eos is not None:
        ids.append(vocab.eos)
    pad = vocab.eos if vocab.pad is None else vocab.pad
    if pad is not None:
        width = -(-len(ids) // _STRIDE) * _STRIDE
        ids += [pad] * (min(width, longest_input(model) or width) - len(ids))
    return np.array(ids, np.int32)


def _fill_rows(
    model: BuiltModel, rows: np.ndarray, rounds: int, keys: jax.Array, options: _Options
) -> tuple[np.ndarray, np.ndarray]:
    mask = model.domain.vocab.mask
    hidden = rows == mask
    count = int(hidden[0].sum())
    tokens, total = rows, np.zeros(len(rows))
    for step in range(rounds):
        number = (step + 1) * count // rounds - step * count // rounds
        batch = batches.unpacked(np.asarray(tokens), model.domain.vocab)
        found = _fill_in(
            model.logits(batch),
            jnp.asarray(tokens),
            jnp.asarray(hidden),
            jnp.asarray(number, jnp.int32),
            jax.vmap(jax.random.fold_in, (0, None))(keys, step),
            jnp.asarray(options.temperature, jnp.float32),
            jnp.asarray(1.0 if options.top_p is None else options.top_p, jnp.float32),
            top_k=options.top_k,
            never=options.never,
        )
        tokens, hidden = np.asarray(found.tokens), np.asarray(found.hidden)
        total += np.asarray(found.log_probability, np.float64)
    return np.asarray(tokens), total


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
    greedy = temperature == 0
    filtered = allowed / jnp.where(greedy, 1, temperature)
    if top_k is not None:
        filtered = samplers.keep_top_k(filtered, top_k)
    filtered = samplers.keep_top_p(filtered, top_p)
    drawn = jax.vmap(samplers.sample_token, (0, 0, None))(
        keys, filtered, jnp.where(greedy, 0.0, 1.0)
    )
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
    return _Draw(
        jnp.where(now, drawn, tokens), hidden & ~now, jnp.sum(jnp.where(now, chosen, 0.0), axis=1)
    )
