"""Sampling proteins from a causal model, as records for a FASTA file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.continuation import continue_prompts
from fast_attention.protein_lm.inference.scoring import PseudoScore, SequenceScore, score_sequences
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.token_batches import Shape
from fast_attention.protein_lm.wording import counted

_ROWS_AT_ONCE = 64


def sample_proteins(model: BuiltModel, num_samples: int, **options: Any) -> list[FastaRecord]:
    """Draws proteins, see `draw_proteins`, and returns them together."""
    return list(draw_proteins(model, num_samples, **options))


def draw_proteins(
    model: BuiltModel,
    num_samples: int,
    *,
    prompt: str = "",
    name: str = "sample",
    seed: int = 0,
    max_length: int | None = None,
    min_length: int | None = None,
    **options: Any,
) -> Iterator[FastaRecord]:
    """Draws proteins, some at a time.

    Protein i depends on the model, on `seed`, on i and on the options, and not on
    `num_samples`; only rounding can differ, between batches of other sizes. A protein has at least
    one residue.

    Args:
      model: A `FlaxLM`.
      num_samples: How many proteins.
      prompt: Residues that every protein begins with.
      name: Ids are this and a number, from 1 on.
      seed: Of the draw.
      max_length: Most residues of a protein, the prompt included; None takes the model's limit.
      min_length: Least residues of a protein, the prompt included, from 1 on; None is 1.
      **options: ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty`` and
        ``repetition_window`` of `SamplingConfig`. Options that are left out or None are those of
        the model's ``sampling_kwargs``.

    Returns:
      Records. The description has ``log_likelihood`` (of the residues, the prompt's included, and
      not of the end; under the model as it is, at temperature 1 and with nothing forbidden;
      natural logarithm, as `score_sequences`), ``residues``, ``ended`` (``yes``, or ``no`` where
      the protein was cut at `max_length`), ``prompt`` where there is one, and ``seed``.

    Raises:
      RunError: If the model is not causal.
      ValueError: If the prompt has a letter that the vocabulary lacks, or an argument is out of
        its range.
    """
    if not model.objective.samples:
        raise RunError(
            f"{type(model).__name__} ({model.objective.name}) fills in hidden residues and cannot "
            "write a protein from left to right: sample from a run of FlaxLM, or give a protein "
            "with hidden residues (protein-lm sample --infill, infilling.infill_proteins in Python)"
        )
    if num_samples < 1:
        raise ValueError(f"the number of samples must be at least 1; got {num_samples}")
    given = {"max_length": max_length, "min_length": min_length, **options}
    settings = {"min_length": 1, **model.sampling_kwargs}
    settings |= {name: value for name, value in given.items() if value is not None}
    if settings["min_length"] < 1:
        raise ValueError(f"min_length must be at least 1; got {settings['min_length']}")
    vocab = model.domain.vocab
    prompt = prompt.upper()
    start = encode_prompt(model, prompt, settings.get("max_length"))
    rows = np.tile(np.array(start, np.int32), (min(num_samples, _ROWS_AT_ONCE), 1))
    shapes: set[Shape] = set()

    def batch(first: int) -> list[FastaRecord]:
        drawn = continue_prompts(model, rows, row_keys(seed, first, len(rows)), **settings)
        sequences = [vocab.decode(ids, stop_at_eos=vocab.eos is not None) for ids in drawn]
        scores = score_sequences(model, sequences, shapes=shapes)
        return [
            FastaRecord(
                f"{name}_{first + row + 1}",
                _describe(score, bool((ids == vocab.eos).any()), prompt, seed),
                sequence,
            )
            for row, (ids, sequence, score) in enumerate(zip(drawn, sequences, scores, strict=True))
        ]

    # The first batch is drawn at once, so that a bad argument raises here and not later.
    found = batch(0)

    def records() -> Iterator[FastaRecord]:
        yield from found[:num_samples]
        for first in range(len(rows), num_samples, len(rows)):
            yield from batch(first)[: num_samples - first]

    return records()


def encode_prompt(model: BuiltModel, prompt: str, max_length: int | None = None) -> list[int]:
    """The ids of a prompt, behind the begin token.

    Args:
      model: A causal model.
      prompt: Residues, in upper case.
      max_length: Most residues of a protein, the prompt included; None is the model's limit.

    Raises:
      ValueError: If the prompt has a letter that is no residue of the vocabulary, or leaves no room
        for another one.
    """
    vocab = model.domain.vocab
    known = vocab.letters
    strange = next((letter for letter in prompt if letter not in known), None)
    if strange is not None:
        raise ValueError(
            f"the prompt has {strange!r}, which is none of the residues {''.join(known)}"
        )
    longest = min(model.max_length, max_length or model.max_length)
    if len(prompt) >= longest:
        raise ValueError(
            f"the prompt has {counted(len(prompt), 'residue')}, but a protein has at most "
            f"{longest:,}, the prompt included (max_length): shorten the prompt"
        )
    assert model.bos_token is not None  # A causal model has one.
    return [model.bos_token, *(known[letter] for letter in prompt)]


def row_keys(seed: int, first: int, number: int) -> jax.Array:
    """Random keys of `number` samples from number `first` on, each a function of its number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(first, first + number)
    )


def _describe(score: SequenceScore | PseudoScore, ended: bool, prompt: str, seed: int) -> str:
    assert isinstance(score, SequenceScore)  # The model is causal.
    start = f" prompt={prompt}" if prompt else ""
    return (
        f"log_likelihood={score.log_likelihood:.4f} residues={score.num_residues} "
        f"ended={'yes' if ended else 'no'}{start} seed={seed}"
    )
