"""Filling in spans of proteins.

A span is written ``*`` for each of its residues, ``[5]`` for five residues, or ``[2-8]`` for two to
eight: ``MKT**AYIA[5]GG``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.sampling import row_keys
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.drawing import Drawing
from fast_attention.protein_lm.modeling.encoding import longest_protein
from fast_attention.protein_lm.modeling.objectives import OBJECTIVES
from fast_attention.protein_lm.modeling.objectives.base import Gapped
from fast_attention.protein_lm.modeling.token_batches import TOKENS_PER_BATCH

HIDDEN = "*"
MARKS = HIDDEN + "[]-0123456789"
"""Symbols that a span is written with."""

_ROWS_AT_ONCE = 16
_SPAN = re.compile(r"\*+|\[(\d{1,6})(?:-(\d{1,6}))?\]")


def without_spans(text: str) -> str:
    """A sequence without its spans: the residues that are known."""
    return _SPAN.sub("", text)


def parse_spans(text: str, alphabet: Alphabet) -> Gapped:
    """Reads a sequence with spans.

    Args:
      text: Residues and spans, in upper case.
      alphabet: Of the model. Where it has ``*`` or brackets as letters, these are spans all the
        same.

    Raises:
      ValueError: If there is no span, one is written in another way or has no residue, or there is
        a letter that the alphabet lacks.
    """
    known, bounds, begin = [], [], 0
    for found in _SPAN.finditer(text):
        low = len(found[0]) if found[1] is None else int(found[1])
        high = low if found[2] is None else int(found[2])
        if not 1 <= low <= high:
            raise ValueError(f"the span {found[0]} must have 1 residue or more: write [5] or [2-8]")
        known.append(text[begin : found.start()])
        bounds.append((low, high))
        begin = found.end()
    known.append(text[begin:])
    for part in known:
        for letter in part:
            if letter not in alphabet.letters:
                raise ValueError(
                    f"{letter!r} is none of the residues {''.join(alphabet.letters)}; a span is "
                    f"written {HIDDEN} for each residue, [5] for 5 residues, or [2-8] for 2 to 8"
                )
    if not bounds:
        raise ValueError(
            f"it has nothing to fill in: write {HIDDEN} for each hidden residue, [5] for 5 of "
            "them, or [2-8] for 2 to 8"
        )
    return Gapped(tuple(np.array(alphabet.encode(part), np.int32) for part in known), tuple(bounds))


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
    """Fills in the spans of proteins, drawing each residue from the model; the others stay.

    How depends on the objective of the model: see `Masked.fill` and `SpanCorruption.fill`.

    Args:
      model: Of an objective that fills in.
      proteins: With spans, see this module.
      num_samples: How often each protein is filled in.
      rounds: Of a masked model, in which the positions of a protein are filled in; None is one for
        each position, and so are more rounds than positions.
      temperature: Divides the logits; 0 takes the most probable residue. None is that of the
        model's ``sampling_kwargs``, or 1.
      top_k: Draw among so many most probable residues.
      top_p: Draw among the fewest residues that together have this probability.
      seed: Of the draw. Sample i of a protein depends on `seed` and i, and not on the others.

    Returns:
      For every protein `num_samples` records, whose ids are its own and a number. The description
      has ``fill_log_probability`` (the sum over the filled positions of the natural logarithm of
      the model's probability of the residue, when it was drawn, at temperature 1 and with nothing
      forbidden), ``filled``, ``residues`` and ``seed``.

    Raises:
      RunError: If the model does not fill in.
      ValueError: If a protein has no span or one that is not possible, a letter that the alphabet
        lacks or more residues than the model takes, or an argument is out of its range.
    """
    if not model.objective.infills:
        possible = [name for name, objective in OBJECTIVES.items() if objective.infills]
        raise RunError(
            f"{type(model).__name__} ({model.objective.name}) sees only what stands before a "
            "residue and cannot fill in hidden ones: use a run of FlaxBERT or with the objective "
            f"{' or '.join(possible)}, or give the beginning of a protein as a prompt"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    if temperature is None:
        temperature = float(model.sampling_kwargs.get("temperature", 1.0))
    drawing = Drawing(temperature, top_k, top_p, rounds)
    drawing.check()
    if rounds is not None and not model.objective.rounds:
        raise ValueError(
            f"rounds={rounds}: a model of the objective {model.objective.name} writes one residue "
            "after another; leave rounds out"
        )
    parsed = [(protein, _parse(model, protein)) for protein in proteins]
    return _fill(model, parsed, num_samples, seed, drawing)


def _parse(model: BuiltModel, protein: FastaRecord) -> Gapped:
    try:
        item = parse_spans(protein.sequence.upper(), model.domain.vocab)
        model.objective.check_spans(item)
    except ValueError as error:
        raise ValueError(f"protein {protein.id!r}: {error}") from None
    residues = sum(map(len, item.known)) + sum(high for _, high in item.bounds)
    room = longest_protein(model)
    if room is not None and residues > room:
        raise ValueError(
            f"protein {protein.id!r} has {residues} residues, but the model's learned positions "
            f"have room for {room}: cut it, or train a model with positions='rotary'"
        )
    return item


def _fill(
    model: BuiltModel,
    proteins: Sequence[tuple[FastaRecord, Gapped]],
    num_samples: int,
    seed: int,
    drawing: Drawing,
) -> Iterator[FastaRecord]:
    for protein, item in proteins:
        known = sum(map(len, item.known))
        most = known + sum(high for _, high in item.bounds)
        size = max(1, min(num_samples, _ROWS_AT_ONCE, TOKENS_PER_BATCH // most))
        for first in range(0, num_samples, size):
            rows, values = model.objective.fill(model, item, row_keys(seed, first, size), drawing)
            for row in range(min(size, num_samples - first)):
                yield FastaRecord(
                    f"{protein.id}_{first + row + 1}",
                    f"fill_log_probability={values[row]:.4f} filled={len(rows[row]) - known} "
                    f"residues={len(rows[row])} seed={seed}",
                    model.domain.vocab.decode(rows[row]),
                )
